"""One evaluation in a forked process, a fault, the same command again, and what must hold after that."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amici_eval.settings.evaluation import EvaluationSpec, PermutationSpec

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tests.soak.faults import Kind, Surroundings

__all__ = ["Outcome", "Place", "evaluate_in_fork", "run_trial", "tables_of", "wait_for"]

SPEC = EvaluationSpec(permutation=PermutationSpec(n_permutations=99))
MODEL = "models:/tiny/1"
_HANG_S = 120.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# through, refused, interrupted, or killed by the fault itself
_CODES = (0, 2, 130, 143, -9)


@dataclass(frozen=True)
class Place:
    """Where commands of a trial log to and write: a tracking store, an experiment, a local folder."""

    uri: str
    experiment: str
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "results"

    @property
    def journal(self) -> Path:
        return self.folder / "finished.jsonl"


@dataclass
class Outcome:
    """What a trial found; it is good if there is nothing in ``wrong``."""

    kind: str
    first: str
    finished: int = 0
    taken: int = 0
    wrong: list[str] = field(default_factory=list)


def evaluate_in_fork(place: Place, *, retry_s: float, name: str, inject: Callable[[], None] | None = None) -> int:
    """Start the command in a fork and return its process id; what it says goes to a file beside its results."""
    # a command that is not set up yet would end as Python does
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return pid
    code = 1
    try:
        # as on the command line: signals interrupt, also while they are ignored by the parent
        log = os.open(place.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = _command(place, retry_s=retry_s, name=name, inject=inject)
    except BaseException:  # noqa: BLE001, RUF100 - a fork must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command(place: Place, *, retry_s: float, name: str, inject: Callable[[], None] | None) -> int:
    import torch

    from amici_eval.cli import commands as cli
    from amici_eval.cli.terminal import forget_signals
    from amici_eval.evaluation.all_types import FinishedParts
    from amici_eval.tracking.jobs.evaluating import evaluate_job
    from amici_eval.tracking.store import tracking_errors
    from tests.builders import job_options

    torch.set_num_threads(1)
    forget_signals()
    # a shell that started the soak in the background lets its children ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli._set_up_process()
    _keep_a_journal(place, FinishedParts, name)
    os.chdir(place.folder)
    if inject is not None:
        inject()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        with tracking_errors():
            tracking = {"uri": place.uri, "experiment": place.experiment, "output_dir": str(place.output)}
            evaluate_job(MODEL, data_uri=None, options=job_options(SPEC, retry_s=retry_s, **tracking))
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    except cli.AmiciEvalError as error:
        print(f"{type(error).__name__}: {error}")
        return 2
    return 0


def _keep_a_journal(place: Place, parts: Any, name: str) -> None:
    """Note what is finished, and what is taken up, in a file that survives the process."""
    put, get = parts.put, parts.get

    def note(**entry: str) -> None:
        handle = os.open(place.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(handle, (json.dumps({"by": name, **entry}) + "\n").encode())
        os.close(handle)

    def noted_put(self: Any, part: str, value: object) -> None:
        before = len(self.kept)
        put(self, part, value)
        if len(self.kept) > before:
            note(finished=part)

    def noted_get(self: Any, part: str) -> Any:
        found = get(self, part)
        if found is not None:
            note(taken=part)
        return found

    parts.put, parts.get = noted_put, noted_get


def wait_for(pid: int) -> int:
    """Return the exit code of a fork, or minus the signal that ended it; one that hangs is an error."""
    until = time.monotonic() + _HANG_S
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)
    os.waitpid(pid, 0)
    return -999


def run_trial(kind: Kind, place: Place, around: Surroundings, rng: random.Random, reference: Path) -> Outcome:
    """Let the command meet a fault, run it again, and look at what there is."""
    place.folder.mkdir(parents=True)
    around = replace(around, output=place.output)
    if kind.before is not None:
        kind.before(around, rng)
    inject = None
    if kind.inside is not None:
        act = kind.inside
        inject = lambda: act(around, rng)  # noqa: E731, RUF100 - runs in the fork
    pids = [
        evaluate_in_fork(place, retry_s=kind.retry_s, name=f"first-{number}", inject=inject)
        for number in range(kind.at_once)
    ]
    if kind.outside is not None:
        kind.outside(pids[0], around, rng)
    codes = [wait_for(pid) for pid in pids]
    outcome = Outcome(kind=kind.name, first=" ".join(map(str, codes)))
    if -999 in codes:
        outcome.wrong.append("the command hung")
    if strange := set(codes) - {-999, *_CODES}:
        outcome.wrong.append(f"the command ended with {sorted(strange)}, without a word of ours")
    if kind.survives and any(codes):
        outcome.wrong.append(f"the command ended with {codes} in spite of a fault that it is to survive")
    if kind.after is not None:
        kind.after(around, rng)
    finished_runs = codes.count(0) or _whole_runs(place)
    said = _journal(place)
    first = {entry["finished"] for entry in said if "finished" in entry}
    code = wait_for(evaluate_in_fork(place, retry_s=0.0, name="again"))
    if code:
        outcome.wrong.append(f"the same command again ended with {code}")
    taken = {entry["taken"] for entry in _journal(place) if "taken" in entry and entry["by"] == "again"}
    outcome.finished, outcome.taken = len(first), len(taken)
    # what a run that ended well held is in the store; damage is not loss; what was kept must be taken up
    if not finished_runs and not kind.name.startswith("damaged") and first - taken:
        outcome.wrong.append(f"computed again although it was finished: {sorted(first - taken)}")
    _check_store(place, outcome, reference, exact=kind.exact)
    left = [path for path in place.folder.rglob("*") if path.is_file() and path.is_relative_to(place.output)]
    # a folder whose state is damaged belongs to nobody any more, and is left to the user
    if left and not kind.name.startswith("damaged"):
        outcome.wrong.append(f"left behind: {[str(path.relative_to(place.output)) for path in left][:5]}")
    return outcome


def _whole_runs(place: Place) -> int:
    """Return how many runs were sent whole and closed before their process was killed, with their folder gone."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=place.uri)
    experiment = client.get_experiment_by_name(place.experiment)
    runs = [] if experiment is None else client.search_runs([experiment.experiment_id])
    return sum(
        run.info.status == "FINISHED"
        and "amici_eval.partial" not in run.data.tags
        and not (place.output / run.info.run_id).exists()
        for run in runs
    )


def _journal(place: Place) -> list[dict[str, str]]:
    if not place.journal.is_file():
        return []
    return [json.loads(line) for line in place.journal.read_text(encoding="utf-8").splitlines()]


def _check_store(place: Place, outcome: Outcome, reference: Path, *, exact: bool) -> None:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=place.uri)
    experiment = client.get_experiment_by_name(place.experiment)
    runs = [] if experiment is None else client.search_runs([experiment.experiment_id])
    states = Counter(run.info.status for run in runs)
    if states["RUNNING"]:
        outcome.wrong.append(f"{states['RUNNING']} runs are RUNNING")
    if not states["FINISHED"]:
        outcome.wrong.append(f"no run is FINISHED: {dict(states)}")
    for run in runs:
        for name in run.data.metrics:
            points = Counter(point.step for point in client.get_metric_history(run.info.run_id, name))
            if max(points.values()) > 1:
                outcome.wrong.append(f"{name} has {max(points.values())} points in one step")
        if run.info.status != "FINISHED":
            if "amici_eval.partial" not in run.data.tags:
                outcome.wrong.append(f"a run is {run.info.status} and not marked as partial")
            continue
        if "amici_eval.partial" in run.data.tags:
            outcome.wrong.append("a FINISHED run is marked as partial")
        found = tables_of(place.uri, run.info.run_id, place.folder / "got")
        if other := _different(found, reference, exact=exact):
            outcome.wrong.append(f"other tables: {other}")


def tables_of(uri: str, run_id: str, folder: Path) -> Path:
    """Return the folder with all artifacts of a run."""
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, dst_path=str(folder / run_id), tracking_uri=uri))


def _different(found: Path, expected: Path, *, exact: bool) -> list[str]:
    """Return the names of tables, and of files of numbers, that are not the same."""
    names = [f"tables/{path.name}" for path in sorted((expected / "tables").glob("*"))]
    if exact:
        names += ["evaluation.json", "significance.json"]
        return [
            name
            for name in names
            if not (found / name).is_file() or (found / name).read_bytes() != (expected / name).read_bytes()
        ]
    import pandas as pd

    different = []
    for name in (name for name in names if name.endswith(".csv")):
        try:
            one, other = (
                pd.read_csv(folder / name, keep_default_na=False, na_values=[""]) for folder in (found, expected)
            )
            # of what is all but nothing, rounding changes much
            pd.testing.assert_frame_equal(one, other, rtol=1e-3, atol=1e-5)
        except (OSError, AssertionError) as error:
            different.append(f"{name} ({str(error).splitlines()[0]})")
    return different
