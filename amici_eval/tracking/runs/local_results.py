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

from amici_eval.common.errors import OutputError
from amici_eval.common.files import write_text_durably
from amici_eval.common.text import mask_secrets

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

RECORD_FILE = "upload.json"
ARTIFACTS = "artifacts"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is sent to a run besides its files.

    ``dataset``: text fields of the dataset input, ``None`` if MLflow logs it; ``model_id``: logged model of the
    metrics; ``model_name`` and ``model_version``: registered version that is tagged with the run; ``series``: (step,
    value) pairs by metric; ``files``: SHA-256 of each artifact by its path in the folder, ``None`` if not all was
    written; ``whole``: all artifacts are written (the others stay if one cannot be drawn).
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
        """Return the record with the checksums of the artifacts in a folder, all of them or some."""
        return replace(self, files=_sums(folder / ARTIFACTS), whole=whole)

    def check_files(self, folder: Path) -> None:
        """Refuse artifacts that changed since they were written."""
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
    """The absolute path below which results are written, and whether the folder was made for this job."""

    path: Path
    made: bool


@contextlib.contextmanager
def output_folder(output_dir: str) -> Iterator[OutputFolder]:
    """Yield the folder for results, or refuse it; a new folder is removed if the body leaves it empty."""
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
    """Return the folder for results, or refuse one that cannot be written; a new one is made only with a run."""
    with output_folder(output_dir) as found:
        return found


@contextlib.contextmanager
def run_folder(output: OutputFolder, run_id: str) -> Iterator[Path]:
    """Yield the folder of a run; if the body fails and leaves it empty, it is removed, and a new parent with it."""
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
        # a random name, because jobs of a sweep share the folder
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
