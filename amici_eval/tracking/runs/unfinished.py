"""Find what interrupted evaluations finished when the same command runs again, and take it up."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amici_eval import __version__
from amici_eval.common.errors import TrackingError, first_line
from amici_eval.common.files import FolderLock, write_text_durably
from amici_eval.common.text import mask_secrets
from amici_eval.evaluation.all_types import FinishedParts
from amici_eval.results.evaluation import FILE_NAME, SCHEMA_VERSION
from amici_eval.results.moments import MOMENTS_FILE
from amici_eval.settings.evaluation import settings_that_matter
from amici_eval.tracking.runs.local_results import RECORD_FILE, output_folder
from amici_eval.tracking.runs.tracked import NOTE_TAG, PARENT_RUN_VARIABLE, PARTIAL_TAG
from amici_eval.tracking.store import asked_again, is_missing, patiently, runs_anywhere, store_errors, understood

if TYPE_CHECKING:
    from amici_eval.settings.evaluation import EvaluationSpec, TrackingSpec

logger = logging.getLogger(__name__)

RESUME_FILE = "resume.json"
CONTINUED_TAG = "amici_eval.continued_by"
PARTS_FOLDER = "parts"
_DONE_SUFFIX = ".done"
_SCHEMA_VERSION = 1
_NAMES = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")
FINGERPRINT_TAG = "amici_eval.fingerprint"


def fingerprint(*, model: str, digest: str, spec: EvaluationSpec) -> str:
    """Return a hash that evaluations with the same numbers share; ``model``: id of the logged model, or its URI."""
    text = json.dumps([SCHEMA_VERSION, model, digest, settings_that_matter(spec)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def resume_key(same: str, *, files: str, device: str, launch: str) -> str:
    """Return a hash that evaluations share if they may take up each other's finished parts."""
    # files: a model in a folder may change; launch: workers have one thread each, so sums may differ in the last digit
    return hashlib.sha256(json.dumps([same, files, device, launch, __version__]).encode()).hexdigest()[:32]


def find_evaluation(fingerprint: str) -> str | None:
    """Return a finished run with this fingerprint, in any experiment, if any; a refused search finds none."""
    from mlflow import MlflowClient

    condition = f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}' and attributes.status = 'FINISHED'"

    def search() -> str | None:
        return next((run.info.run_id for run in runs_anywhere(MlflowClient(), condition)), None)

    try:
        return patiently(search, what="searching for an earlier evaluation")
    except store_errors() as error:
        logger.warning(
            "the store refused to search for an earlier evaluation (%s): a new one is made", first_line(error)
        )
        return None


@asked_again("fetching an evaluation")
def download_evaluation(run_id: str, folder: Path, *, tracking_uri: str | None = None) -> bool:
    """Fetch an evaluation and its moments from a run into a folder, and return whether the run holds one."""
    from mlflow.artifacts import download_artifacts, list_artifacts

    there = {item.path for item in list_artifacts(run_id=run_id, tracking_uri=tracking_uri)}
    if FILE_NAME not in there:
        return False
    for name in sorted({FILE_NAME, MOMENTS_FILE} & there):
        download_artifacts(run_id=run_id, artifact_path=name, dst_path=str(folder), tracking_uri=tracking_uri)
    return True


@dataclass(frozen=True, kw_only=True)
class _UnfinishedFolder:
    """The folder of an earlier evaluation with the same key; without a lock another process may still work in it."""

    folder: Path
    run_id: str
    where: Any
    lock: FolderLock | None


class UnfinishedWork:
    """The local folder of an evaluation, with what earlier ones with the same key left; use it as a context manager.

    A folder is locked as long as its process lives. One without an owner is taken up: its run goes on if it has the
    same experiment and parent, else a new run takes its parts. Parts of a folder with an owner are only read. Folders
    that were taken up are removed only when all is sent.
    """

    def __init__(self, tracking: TrackingSpec, *, key: str, tracking_uri: str, n_types: int) -> None:
        self._tracking, self._key, self._n_types = tracking, key, n_types
        # a setting wins over the environment, which MLflow changes itself
        experiment = [tracking.experiment] if tracking.experiment is not None else [os.environ.get(n) for n in _NAMES]
        below = os.environ.get(PARENT_RUN_VARIABLE) or os.environ.get("MLFLOW_RUN_ID")
        self._where = [mask_secrets(tracking_uri), *experiment, below]
        self._stack = contextlib.ExitStack()
        self._left: list[_UnfinishedFolder] = []
        # set when the run begins
        self._folder = Path()
        self._lock: FolderLock | None = None
        self._parts: FinishedParts | None = None
        self._made_output = False
        self._is_done = False

    def __enter__(self) -> UnfinishedWork:
        self._output = self._stack.enter_context(output_folder(self._tracking.output_dir))
        # this process or the interrupted one, whose folder it takes up, made the folder for results
        self._made_output = self._output.made
        try:
            if self._tracking.resume == "auto":
                self._find()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None and self._parts is not None and not self._is_done:
            self._say_what_is_kept(error)
        self._release()

    @property
    def run_id(self) -> str | None:
        """Id of the run that is to go on, ``None`` to start one."""
        import mlflow
        from mlflow.exceptions import MlflowException

        active = getattr(mlflow.tracking.fluent, "_active_experiment_id", None)
        for one in self._left:
            if one.lock is None or one.where != self._where:
                continue
            try:
                run = mlflow.MlflowClient().get_run(one.run_id)
            except MlflowException as error:
                if not is_missing(error):
                    raise
                continue
            # if the last answer to its process was lost, the run is whole although its folder is still there
            ended = run.info.status == "FINISHED" and not (one.folder / RECORD_FILE).exists()
            whole = ended and PARTIAL_TAG not in run.data.tags
            if run.info.lifecycle_stage == "active" and not whole and active in (None, run.info.experiment_id):
                return one.run_id
        return None

    def begin(self, run_id: str) -> tuple[Path, FinishedParts]:
        """Return the folder of a run, now owned by this process, and the finished parts."""
        folder = self._output.path / run_id
        own = next((one for one in self._left if one.folder == folder), None)
        state = {
            "schema_version": _SCHEMA_VERSION,
            "key": self._key,
            "run_id": run_id,
            "where": self._where,
            "n_types": self._n_types,
            "made_output": self._made_output,
        }
        self._folder, self._lock = folder, None if own is None else own.lock
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock or FolderLock.take(folder)
            write_text_durably(folder / RESUME_FILE, json.dumps(state, indent=1))
        except OSError as error:
            # no reason to stop: parts that cannot be saved are reported as well, and results can go to another folder
            logger.warning("%s cannot be written (%s): the work could not be taken up there", folder, error)
        others = [one.folder / PARTS_FOLDER for one in self._left if one.folder != folder]
        self._parts = FinishedParts(folder / PARTS_FOLDER, key=self._key, others=others)
        self._parts.sweep()
        there = sum(FinishedParts.count_in(one.folder / PARTS_FOLDER) for one in self._left)
        if there:
            logger.info(
                "an interrupted evaluation left %d finished parts (attention, each cell type, baselines) in %s; "
                "what is not damaged is taken up, %s",
                there,
                ", ".join(str(one.folder) for one in self._left),
                "and its run goes on" if own is not None else f"into run {run_id}",
            )
        return folder, self._parts

    def finished(self) -> str:
        """Return how many types are finished and kept, as part of a sentence."""
        return "" if self._parts is None else f", {self._parts.n_types} of {self._n_types} cell types are finished"

    def done(self) -> Path | None:
        """Remove what is not needed any more once all is sent; return the local copy if it is to stay."""
        folder = self._folder
        self._is_done = True
        for one in self._left:
            # results that were not sent yet may still be sent to their own run
            unsent = (one.folder / RECORD_FILE).exists()
            if one.lock is not None and one.folder != folder and not unsent:
                _remove(one.folder)
        self._point_to_successor(folder.name)
        if self._tracking.keep_local:
            forget_parts(folder)
            if self._lock is not None:
                self._lock.release(remove=True)
            return folder
        _remove(folder)
        if self._made_output:
            with contextlib.suppress(OSError):
                self._output.path.rmdir()
        return None

    def _point_to_successor(self, run_id: str) -> None:
        """Tag interrupted runs whose parts went into another run with the id of that run."""
        import mlflow

        for one in self._left:
            if (
                one.lock is None
                or (one.folder / RECORD_FILE).exists()
                or one.run_id == run_id
                or not isinstance(one.where, list)
                or one.where[0] != self._where[0]
            ):
                continue
            try:
                client = mlflow.MlflowClient()
                client.set_tag(one.run_id, CONTINUED_TAG, run_id)
                client.set_tag(one.run_id, NOTE_TAG, f"**Partial**: what it finished went into run {run_id}.")
            except store_errors() as error:
                # the old run may have been deleted; the results are sent in any case
                logger.debug("run %s could not be tagged: %s", one.run_id, error)

    def _find(self) -> None:
        for left in self._output.path.glob(f"*{_DONE_SUFFIX}"):
            shutil.rmtree(left, ignore_errors=True)
        found = []
        for path in self._output.path.glob(f"*/{RESUME_FILE}"):
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
                own = state["schema_version"] == _SCHEMA_VERSION and path.parent.name == state["run_id"]
                if own and state["key"] == self._key:
                    found.append((path.stat().st_mtime_ns, path.parent, state))
            except OSError as error:
                # another process may just be removing its folder
                logger.debug("%s is not taken up: %s", path, error)
            except (ValueError, TypeError, LookupError, RecursionError) as error:
                logger.warning(
                    "%s is damaged (%s): what is finished there is not taken up; remove the folder", path, error
                )
        for _, folder, state in sorted(found, key=lambda one: one[0], reverse=True):
            lock = FolderLock.take(folder)
            self._left.append(
                _UnfinishedFolder(folder=folder, run_id=state["run_id"], where=state.get("where"), lock=lock)
            )
            self._made_output |= bool(state.get("made_output"))

    def _say_what_is_kept(self, error: BaseException | None) -> None:
        folder, kept = self._folder, FinishedParts.count_in(self._folder / PARTS_FOLDER)
        # an interrupted run goes on also if nothing was finished
        if kept == 0 and not (folder / RECORD_FILE).exists() and not isinstance(error, KeyboardInterrupt):
            shutil.rmtree(folder, ignore_errors=True)
        elif not isinstance(error, TrackingError):
            fault = None if error is None else understood(error)
            again = "the same command again" if fault is None or fault.passing else "after that is mended, the command"
            logger.warning("what is finished is kept in %s%s; %s goes on from there", folder, self.finished(), again)

    def _release(self) -> None:
        for lock in (*(one.lock for one in self._left), self._lock):
            if lock is not None:
                lock.release()
        self._stack.close()


def _remove(folder: Path) -> None:
    """Remove a folder whose results are all sent; it is renamed first, so that remains of it are never taken up."""
    done = folder.with_name(f"{folder.name}{_DONE_SUFFIX}")
    try:
        folder.rename(done)
    except OSError:
        done = folder
    shutil.rmtree(done, ignore_errors=True)


def forget_parts(folder: Path) -> None:
    """Remove the finished parts and the resume file from a folder of results."""
    (folder / RESUME_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS_FOLDER, ignore_errors=True)
