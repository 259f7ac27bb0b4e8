"""The local folder of a run: what is to be sent, and how it is checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from amici_eval.common.errors import OutputError, mask_secrets
from amici_eval.common.files import write_text_durably

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["ARTIFACTS", "RECORD_FILE", "OutputFolder", "RunRecord", "check_writable", "output_folder", "remove_local"]

RECORD_FILE = "upload.json"
ARTIFACTS = "artifacts"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What has to be sent to a run besides its files.

    Parameters
    ----------
    tracking_uri, run_id
        The run.
    params, metrics, tags
        As logged.
    dataset
        The dataset input as text fields (name, digest, source, source_type, profile); ``None`` if MLflow logs it.
    model_id
        Logged model that the metrics belong to.
    model_name, model_version
        Registered version that gets tags pointing back to the run.
    timestamp_ms
        Time of the metrics.
    series
        Metrics with a value for several steps, as (step, value).
    files
        SHA-256 of each artifact by its path in the folder; ``None``: the writer did not come to its end.
    whole
        Whether all artifacts are written: one that cannot be drawn leaves the others.
    """

    tracking_uri: str
    run_id: str
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    dataset: Mapping[str, str] | None = None
    model_id: str | None = None
    model_name: str | None = None
    model_version: str | None = None
    timestamp_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    series: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    files: Mapping[str, str] | None = None
    whole: bool = False

    def save(self, folder: Path) -> None:
        """Write the record beside the artifacts, without the credentials of the tracking URI."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {**asdict(self), "tracking_uri": mask_secrets(self.tracking_uri)}
        write_text_durably(folder / RECORD_FILE, json.dumps(values, indent=1))

    def with_files(self, folder: Path, *, whole: bool = True) -> RunRecord:
        """Return the record of a folder whose artifacts are written, all of them or some."""
        return replace(self, files=_sums(folder / ARTIFACTS), whole=whole)

    def check_files(self, folder: Path) -> None:
        """Refuse artifacts that are not those that were written."""
        if self.files is None:
            raise OutputError(
                value=f"{folder} holds partial results",
                rule="they were being written when the evaluation was interrupted",
                fix="run the same command again: it takes up what is finished, and writes and sends the rest",
            )
        there = _sums(folder / ARTIFACTS)
        for name, expected in self.files.items():
            if there.get(name) != expected:
                state = "missing" if name not in there else "not as it was written (SHA-256 differs)"
                raise OutputError(
                    value=f"{folder / ARTIFACTS / name} is {state}",
                    rule="only whole results are sent",
                    fix="run the same command again: it takes up what is whole, and computes the rest",
                )

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Read a record back."""
        try:
            return cls(**json.loads((folder / RECORD_FILE).read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError, RecursionError) as error:
            raise OutputError(
                value=f"{folder} holds no readable {RECORD_FILE} ({type(error).__name__})",
                rule="it must be the folder that an interrupted evaluation named",
                fix="give that folder",
            ) from error


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass(frozen=True)
class OutputFolder:
    """The folder below which results are written.

    Parameters
    ----------
    path
        Absolute.
    made
        Whether it was made for this job.
    """

    path: Path
    made: bool


@contextlib.contextmanager
def output_folder(output_dir: str) -> Iterator[OutputFolder]:
    """Make the folder for results, or refuse it; one that was made for a body that left nothing in it goes again."""
    path = Path(output_dir).absolute()
    made = not path.exists()
    check_writable(path)
    try:
        yield OutputFolder(path, made)
    finally:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()


def checked_output(output_dir: str) -> OutputFolder:
    """Return the folder for results, which can be written and is made once there are some, or refuse it."""
    with output_folder(output_dir) as found:
        return found


@contextlib.contextmanager
def run_folder(output: OutputFolder, run_id: str) -> Iterator[Path]:
    """Make the folder of a run; one that a body left empty when it failed goes again, with the one above."""
    folder = output.path / run_id
    check_writable(folder)
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
            if output.made:
                output.path.rmdir()
        raise


def check_writable(folder: Path) -> None:
    """Make a folder and refuse one that cannot be written, before any long work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a name of its own: jobs of a sweep share the folder
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            value=f"{folder} cannot be written ({error.strerror or error})",
            rule="results are kept there until they are sent",
            fix="choose another folder with tracking.output_dir=...",
        ) from error


def remove_local(folder: Path, *, with_parent: bool) -> None:
    """Remove the local copy of what was sent, and the folder above if that was made for it and is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    if with_parent:
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
