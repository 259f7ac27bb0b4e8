"""Each command against a server that gives a wrong answer once, at each endpoint that the command calls."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import pytest

from amici_eval.cli.commands import main
from amici_eval.evaluation import pipeline
from amici_eval.tracking import store
from amici_eval.tracking.jobs import promotion
from tests.serving import Server
from tests.stub import ANSWERS, PASSING, Stub

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.amici, pytest.mark.server, pytest.mark.slow]

FAST = (
    *("report.figures=false", "permutation.n_permutations=10", "permutation.spatial_null=none"),
    *("ablation.baselines=false", "tracking.retry_s=60"),
)
QUICK = (*FAST, "compare.floor=false")
COMMANDS = {
    "evaluate": ("evaluate", "model_uri=models:/tiny/1", *FAST),
    "register": ("register", "name=other", "tracking.retry_s=60"),
    "compare": ("compare", "model=tiny", "versions=[1,2]", *QUICK),
    "gate": ("gate", "model_uri=models:/tiny/2", *QUICK),
    "watch": ("watch", "model=tiny", "--once", *QUICK),
    "rollback": ("rollback", "model=tiny"),
}


class Desk:
    """A store behind a stub, with models in it, and commands that run in this process."""

    def __init__(self, stub: Stub, register: tuple[str, ...]) -> None:
        self.stub, self.register = stub, register
        self.computed = 0

    def run(self, name: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> tuple[int, str]:
        command, self.computed = COMMANDS[name], 0
        # else MLflow itself asks again, and an answer that is given once is never seen. A model is logged once: there
        # only MLflow asks again
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1" if name == "register" else "0"
        if name == "register":
            command = (*command, *self.register)
        if name == "rollback":
            mlflow.set_tracking_uri(self.stub.upstream)
            promotion.promote("tiny", "1", alias="champion", expected=None)
        caplog.clear()
        with pytest.raises(SystemExit) as end:
            main([*command, f"tracking.uri={self.stub.uri}"])
        while mlflow.active_run() is not None:
            mlflow.end_run()
        return int(end.value.code or 0), capsys.readouterr().err + caplog.text

    def endpoints(self, name: str, capsys, caplog) -> list[str]:
        self.stub.set()
        assert self.run(name, capsys, caplog)[0] in (0, 3, 4)
        return sorted(set(self.stub.asked))


@pytest.fixture(scope="module")
def _store(tmp_path_factory: pytest.TempPathFactory, amici_dir: Path, _tissue, new_store) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("answers")
    new_store(folder / "m.db", artifacts="mlflow-artifacts:/0")
    server = Server(folder)
    server.start()
    stub = Stub(server.uri)
    _tissue.write_h5ad(folder / "tissue.h5ad")
    register = (f"model_dir={amici_dir}", f"data.uri={folder / 'tissue.h5ad'}")
    try:
        for _ in range(2):
            with pytest.raises(SystemExit) as end:
                main(["register", "name=tiny", *register, f"tracking.uri={stub.uri}"])
            assert end.value.code == 0
        yield Desk(stub, register)
    finally:
        stub.close()
        server.stop()


@pytest.fixture
def desk(_store: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(store, "_FIRST_WAIT_S", 0.01)
    # one that could not be given back is waited for
    monkeypatch.setattr(promotion, "_LEASE_S", 5.0)
    real, kept = pipeline.evaluate_access, _EVALUATED

    def once(access, *args, **kwargs):
        _store.computed += 1
        if "one" not in kept:
            kept["one"] = real(access, *args, **kwargs)
        return kept["one"]

    monkeypatch.setattr(pipeline, "evaluate_access", once)
    before = mlflow.get_tracking_uri()
    try:
        yield _store
    finally:
        _store.stub.set()
        mlflow.set_tracking_uri(before)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.NOTSET)


_EVALUATED: dict[str, object] = {}
"""The numbers are not what is tested here: they are computed once."""


def faults_of(answer: str, code: int, said: str, *, computed: bool) -> list[str]:
    """Return what is wrong with a cell of the table."""
    wrong = [words for words in ("Traceback", "HYDRA_FULL_ERROR", "fault of amici_eval") if words in said]
    if code not in (0, 2, 3, 4):
        wrong.append(f"exit {code}")
    if answer in PASSING and code == 2:
        wrong.append("not asked again")
    if answer not in PASSING and "same command again" in said:
        wrong.append("useless advice")
    kept = [Path(folder) for folder in re.findall(r"amici-eval upload (\S+)", said)]
    if code == 2 and computed and not any((folder / "upload.json").is_file() for folder in kept):
        wrong.append("results are lost")
    return wrong


def cells(name: str, endpoints: list[str]) -> list[tuple[str, str]]:
    """Return the cells of the table to look at: some, or with AMICI_EVAL_ALL_ANSWERS=1 all, which takes an hour."""
    if os.environ.get("AMICI_EVAL_ALL_ANSWERS"):
        return [(endpoint, answer) for endpoint in endpoints for answer in ANSWERS]
    every = {"evaluate": 2, "register": 3, "rollback": 1}.get(name, 9)
    turn = list(COMMANDS).index(name)
    return [(endpoint, ANSWERS[(3 * n + turn) % len(ANSWERS)]) for n, endpoint in enumerate(endpoints[::every])]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_answer_of_a_server_ends_in_a_traceback_or_loses_results(name, desk, capsys, caplog):
    wrong = {}
    for endpoint, answer in cells(name, desk.endpoints(name, capsys, caplog)):
        desk.stub.set(endpoint, answer)
        code, said = desk.run(name, capsys, caplog)
        found = faults_of(answer, code, said, computed=desk.computed > 0)
        if found:
            wrong[endpoint, answer] = (found, code, said[-500:])
    assert not wrong
