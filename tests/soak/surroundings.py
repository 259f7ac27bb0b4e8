"""What the trials share: a small registered model, SQLite, a server behind a proxy, and a process that is warm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import requests

from tests.serving import Server, free_port
from tests.soak.faults import Kind, Surroundings
from tests.soak.trial import Outcome, Place, evaluate_in_fork, run_trial, tables_of, wait_for

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

__all__ = ["Soak", "warmed"]

_SETUP = """
import sys
import numpy as np
from amici_eval.settings.evaluation import TrackingSpec
from amici_eval.tracking.jobs.evaluating import register_job
from tests.conftest import small_tissue, train_plainly

folder, uris = sys.argv[1], sys.argv[2:]
tissue = small_tissue()
train_plainly(tissue, np.flatnonzero((tissue.obs["region"] == "rest").to_numpy())).save(f"{folder}/model")
tissue.write_h5ad(f"{folder}/tissue.h5ad")
for uri in uris:
    register_job(
        f"{folder}/model", name="tiny", data_uri=f"{folder}/tissue.h5ad", adata=None, trust=False, alias=None,
        tracking=TrackingSpec(uri=uri),
    )
"""


@dataclass(frozen=True)
class Soak:
    """Everything that trials need."""

    folder: Path
    arounds: dict[str, Surroundings]
    local: str
    remote: str
    references: dict[str, Path]

    def trial(self, kind: Kind, number: int, rng: random.Random) -> Outcome:
        """Run one trial."""
        place = Place(self.remote if kind.remote else self.local, f"trial {number}", self.folder / f"trial-{number}")
        outcome = run_trial(kind, place, self.arounds[place.uri], rng, self.references[place.uri])
        if not outcome.wrong:
            shutil.rmtree(place.folder, ignore_errors=True)
        return outcome


@contextmanager
def warmed(folder: Path) -> Iterator[Soak]:
    """Set everything up; the process that calls this is the one that trials are forked from.

    Notes
    -----
    The store of the trials is never opened by a thread or connection that lives on in a fork: it is filled by another
    process, and this one is warmed on a copy of it.
    """
    folder = folder.absolute()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    (folder / "server").mkdir()
    server = Server(folder / "server")
    server.start()
    port = free_port()
    proxy = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-m", "tests.soak.proxy", str(port), server.uri])
    before = Path.cwd()
    # MLflow puts artifacts of SQLite's experiments below the folder that it is first used in
    os.chdir(folder)
    try:
        _wait(proxy)
        local = f"sqlite:///{folder / 'm.db'}"
        subprocess.run(
            [sys.executable, "-c", _SETUP, str(folder), local, server.uri],
            check=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(before) for path in sys.path)},
        )
        _warm_up(folder)
        reference, seconds, writes = _undisturbed(Place(local, "reference", folder / "reference"))
        counted = _count(proxy)
        again, remote_seconds, _ = _undisturbed(Place(proxy, "reference", folder / "reference-server"))
        # what the check itself asks is more than what the command asks, but not by much
        asked = max(10, (_count(proxy) - counted) * 2 // 3)
        for table in sorted((reference / "tables").glob("*")):
            assert table.read_bytes() == (again / "tables" / table.name).read_bytes(), "a server changes numbers"
        parts = sum("finished" in line for line in (folder / "reference" / "finished.jsonl").read_text().splitlines())
        around = Surroundings(folder, proxy, seconds, writes, asked, parts)
        far = replace(around, seconds=remote_seconds)
        yield Soak(folder, {local: around, proxy: far}, local, proxy, {local: reference, proxy: again})
    finally:
        os.chdir(before)
        process.terminate()
        process.wait(30)
        server.stop()


def _warm_up(folder: Path) -> None:
    """Import and compile everything, on a store that no trial uses."""
    import mlflow
    import torch

    from amici_eval.tracking.jobs.evaluating import evaluate_job
    from tests.builders import job_options
    from tests.soak.trial import MODEL, SPEC

    # a pool of threads would not survive the fork
    torch.set_num_threads(1)
    shutil.copy(folder / "m.db", folder / "warm.db")
    options = job_options(SPEC, uri=f"sqlite:///{folder / 'warm.db'}", output_dir=str(folder / "warm"))
    evaluate_job(MODEL, data_uri=None, options=options)
    mlflow.set_tracking_uri(None)


def _undisturbed(place: Place) -> tuple[Path, float, int]:
    """Return the tables of a command that nothing disturbs, its seconds, and how many files it writes."""
    import mlflow

    place.folder.mkdir()
    counted = place.folder / "writes"

    def count() -> None:
        below = str(place.output)

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event == "open" and str(arguments[0]).startswith(below) and isinstance(arguments[2], int):
                if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    with counted.open("a") as file:
                        file.write("x")

        sys.addaudithook(hook)

    began = time.monotonic()
    code = wait_for(evaluate_in_fork(place, retry_s=0.0, name="reference", inject=count))
    seconds = time.monotonic() - began
    assert code == 0, (place.folder / "reference.log").read_text()
    client = mlflow.MlflowClient(tracking_uri=place.uri)
    (run,) = client.search_runs([client.get_experiment_by_name(place.experiment).experiment_id])
    tables = tables_of(place.uri, run.info.run_id, place.folder / "got")
    return tables, seconds, len(counted.read_text()) if counted.is_file() else 1


def _count(proxy: str) -> int:
    return int(requests.get(f"{proxy}/__count", timeout=10).text)


def _wait(uri: str) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            requests.get(f"{uri}/__count", timeout=2)
        except requests.RequestException:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(uri)
