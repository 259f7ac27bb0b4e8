"""One evaluation over real workers of Ray on loopback: the same numbers, lost workers, errors, what stays behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from amici_eval.common.errors import DataError, DeviceError, InvalidSpecError, LaunchError
from amici_eval.evaluation.launching import open_launcher
from amici_eval.evaluation.pipeline import evaluate, evaluate_access
from amici_eval.settings.evaluation import AblationSpec, EvaluationSpec, LaunchSpec, PermutationSpec
from tests.cli.test_cli import call
from tests.fakes import FakeAccess, make_access
from tests.same_numbers import differences

if TYPE_CHECKING:
    from collections.abc import Iterator

    from amici_eval.evaluation.launching import RayLauncher

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="the extra ray is not installed")
QUICK = EvaluationSpec(permutation=PermutationSpec(n_permutations=49))
TYPES = ("CD8+_T_Cells", "Microglia/PVM", "β cell")


@pytest.fixture(scope="module")
def workers() -> Iterator[RayLauncher]:
    """Two workers of a cluster of our own."""
    with open_launcher(LaunchSpec(kind="ray", n_workers=2, retries=1)) as launcher:
        yield launcher


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Workers compute on one thread; on several, sums over the cells of a large type are rounded otherwise."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class TroubledAccess(FakeAccess):
    """Something happens in the process that reads the expression of one type, and a file says so."""

    diary: Path = Path()
    trouble: str = ""
    troubled: str = TYPES[0]
    driver: int = 0

    def expression(self, rows: np.ndarray) -> np.ndarray:
        if self.labels[rows[0]] == self.troubled:
            assert os.getpid() != self.driver, "types are evaluated in workers"
            before = self.diary.read_text() if self.diary.exists() else ""
            self.diary.write_text(f"{before}{os.getpid()}\n")
            if self.trouble == "DataError":
                raise DataError(value="X", rule="Y", fix="Z")
            if self.trouble == "ZeroDivisionError":
                _ = 1 // 0
            if self.trouble == "always killed" or (self.trouble == "killed" and not before):
                time.sleep(120)
        return super().expression(rows)


def troubled(tmp_path: Path, trouble: str) -> TroubledAccess:
    return TroubledAccess(**vars(make_access()), diary=tmp_path / "diary", trouble=trouble, driver=os.getpid())


class Killer:
    """Kills each process that writes into the diary, from where progress is told."""

    def __init__(self, diary: Path, *, at_most: int) -> None:
        self.diary, self.left, self.killed, self.told = diary, at_most, [], []

    def __call__(self, done: int, total: int, what: str) -> None:
        self.told.append((done, total, what))
        written = self.diary.read_text().split() if self.diary.exists() else []
        for process in map(int, written):
            if process not in self.killed and self.left:
                os.kill(process, signal.SIGKILL)
                self.killed.append(process)
                self.left -= 1


def test_the_comparison_of_results_can_fail():
    one, other = (evaluate_access(make_access(), QUICK) for _ in range(2))
    assert differences(one, other) == []
    place = (0, 1)
    other.p_value[place] = np.nextafter(other.p_value[place], 1.0)
    (found,) = differences(one, other)
    assert found.startswith(".p_value: differs by up to ")


@pytest.mark.ray
@needs_ray
def test_plain_arrays_give_the_same_numbers(workers):
    for sizes in (None, {"CD8+_T_Cells": 40, "Microglia/PVM": 2, "β cell": 1}):
        here = evaluate_access(make_access(sizes), QUICK)
        assert differences(here, evaluate_access(make_access(sizes), QUICK, launcher=workers)) == []


@pytest.mark.ray
@pytest.mark.amici
@needs_ray
@pytest.mark.parametrize("engine", ["factored", "hooked"])
@pytest.mark.parametrize("method", ["monte_carlo", "moments"])
def test_a_model_gives_the_same_numbers(workers, trained, adata, engine, method):
    spec = EvaluationSpec(
        ablation=AblationSpec(engine=engine, device="cpu", senders=engine == "factored"),
        permutation=PermutationSpec(n_permutations=99, method=method),
    )
    here = evaluate(trained, adata, spec)
    assert here.engine == engine
    assert here.spatial is not None
    assert differences(here, evaluate(trained, adata, spec, launcher=workers)) == []


@pytest.mark.ray
@pytest.mark.amici
@needs_ray
@pytest.mark.parametrize("engine", ["factored", "hooked"])
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_expression_on_disk_gives_the_same_numbers(workers, trained, adata, tmp_path, engine, suffix):
    from scipy import sparse

    from amici_eval.data.files import open_anndata

    path = tmp_path / f"tissue.{suffix}"
    if engine == "factored":
        adata.X = sparse.csr_matrix(adata.X)
    getattr(adata, "write_h5ad" if suffix == "h5ad" else "write_zarr")(path)
    spec = EvaluationSpec(ablation=AblationSpec(engine=engine, device="cpu"), permutation=QUICK.permutation)
    here = evaluate(trained, open_anndata(path, backed=False), spec)
    there = evaluate(trained, open_anndata(path, backed=True), spec, launcher=workers)
    assert differences(here, there) == []


@pytest.mark.ray
@needs_ray
def test_progress_is_told_type_by_type(workers):
    told = []
    evaluate_access(make_access(), QUICK, launcher=workers, progress=lambda *one: told.append(one))
    done = [one[0] for one in told]
    assert done == sorted(done)
    assert told[-1][0] == told[-1][1]
    assert all(any(name in what for _, _, what in told) for name in TYPES)


@pytest.mark.ray
@needs_ray
def test_an_interrupt_from_progress_ends_the_evaluation_and_workers_go_on(workers):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_access(make_access(), QUICK, launcher=workers, progress=interrupt)
    here = evaluate_access(make_access(), QUICK)
    assert differences(here, evaluate_access(make_access(), QUICK, launcher=workers)) == []


@pytest.mark.ray
@needs_ray
def test_the_type_of_a_killed_worker_is_evaluated_by_another(workers, tmp_path, caplog):
    access = troubled(tmp_path, "killed")
    killer = Killer(access.diary, at_most=1)
    found = evaluate_access(access, QUICK, launcher=workers, progress=killer)
    first, second = access.diary.read_text().split()
    assert killer.killed == [int(first)]
    assert second != first
    assert any(line.startswith(f"{TYPES[0]}: its worker was lost (ActorDiedError") for line in caplog.messages), (
        caplog.messages
    )
    assert killer.told[-1][0] == killer.told[-1][1]
    assert differences(evaluate_access(make_access(), QUICK), found) == []


@pytest.mark.ray
@needs_ray
def test_a_type_that_always_loses_its_worker_is_given_up(workers, tmp_path):
    access = troubled(tmp_path, "always killed")
    killer = Killer(access.diary, at_most=9)
    with pytest.raises(LaunchError, match=r"CD8\+_T_Cells: its worker was lost 2 times.*tried again 1 times"):
        evaluate_access(access, QUICK, launcher=workers, progress=killer)
    assert len(killer.killed) == 2


@pytest.mark.ray
@needs_ray
@pytest.mark.parametrize("kind", [DataError, ZeroDivisionError])
def test_an_error_in_a_worker_arrives_as_itself_and_is_not_tried_again(workers, tmp_path, kind):
    access = troubled(tmp_path, kind.__name__)
    with pytest.raises(kind) as caught:
        evaluate_access(access, QUICK, launcher=workers)
    assert type(caught.value) is kind
    if kind is DataError:
        assert (caught.value.value, caught.value.rule, caught.value.fix) == ("X", "Y", "Z")
    assert len(access.diary.read_text().split()) == 1


@pytest.mark.ray
@needs_ray
def test_what_cannot_be_sent_is_named(workers):
    access = make_access()
    access.asked.append(x for x in ())
    with pytest.raises(LaunchError, match=r"the model cannot be sent to workers: .*generator"):
        evaluate_access(access, QUICK, launcher=workers)


@pytest.mark.ray
@needs_ray
def test_more_workers_than_processors_are_refused(workers):
    from amici_eval.evaluation.launching import RayLauncher

    with RayLauncher(LaunchSpec(kind="ray", n_workers=3)) as more, pytest.raises(LaunchError, match="cluster has 2"):
        more.prepare(5)


@pytest.mark.ray
@needs_ray
def test_processors_are_what_workers_compute_on(workers):
    access = make_access()
    access.statistics_device = "cuda"
    with pytest.raises(DeviceError, match=r"launch=ray on the device cuda.*set ablation\.device=cpu"):
        list(workers.run(access, [], None, heartbeat=lambda: None))


_OUTSIDE = """
import os, sys, tempfile
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
import ray
from amici_eval.common.errors import LaunchError
from amici_eval.evaluation.pipeline import evaluate_access
from amici_eval.settings.evaluation import LaunchSpec
from amici_eval.evaluation.launching import open_launcher
from tests.fakes import make_access
from tests.evaluation.test_ray import QUICK
"""


def in_another_process(code: str, tmp_path: Path) -> str:
    """Run code where no cluster is connected, and return what it prints."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _OUTSIDE + code],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder with a name short enough for sockets."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="r-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.ray
@needs_ray
def test_a_cluster_of_our_own_listens_on_loopback_and_is_gone_afterwards(short_path):
    told = in_another_process(
        """
import psutil, signal
def processes():
    return [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
def handler(*_): pass
signal.signal(signal.SIGTERM, handler)
try:
    with open_launcher(LaunchSpec(kind="ray", n_workers=2)) as launcher:
        assert signal.getsignal(signal.SIGTERM) is handler
        evaluate_access(make_access(), QUICK, launcher=launcher)
        ours = [psutil.Process(), *processes()]
        listening = {c.laddr.ip for one in ours for c in one.net_connections("tcp") if c.status == "LISTEN"}
        resources = ray.cluster_resources()
        print(listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"})
        print(resources["CPU"], resources["object_store_memory"] <= 500 * 2**20)
        raise ZeroDivisionError
except ZeroDivisionError:
    print(ray.is_initialized(), psutil.wait_procs(ours[1:], timeout=20)[1], os.listdir(tempfile.gettempdir()))
    assert signal.getsignal(signal.SIGTERM) is handler
""",
        short_path,
    )
    assert told.splitlines() == ["True", "2.0 True", "False [] []"]


@pytest.mark.slow
@pytest.mark.ray
@needs_ray
def test_of_a_cluster_that_was_there_only_our_workers_end(short_path):
    told = in_another_process(
        """
import subprocess
theirs = subprocess.Popen(
    [sys.executable, "-c", "import ray, sys\\ncontext = ray.init('local', num_cpus=2, include_dashboard=False, "
     # Ray takes 127.0.0.1 in an address for the address of the machine in its network
     "_node_ip_address='127.0.0.2', object_store_memory=100 * 2**20, log_to_driver=False, logging_level=30)\\n"
     "print(context.address_info['gcs_address'], flush=True)\\nsys.stdin.read()\\nassert len(ray.nodes()) == 1"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
)
address = theirs.stdout.readline().strip()
with open_launcher(LaunchSpec(kind="ray", address=address, n_workers=2)) as launcher:
    evaluate_access(make_access(), QUICK, launcher=launcher)
    print(ray.available_resources().get("CPU", 0))
print(ray.is_initialized(), theirs.poll())
ray.init(address=address, log_to_driver=False, logging_level=30)
import time
until = time.monotonic() + 30
while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < until:
    time.sleep(0.2)
print([node["Alive"] for node in ray.nodes()], ray.available_resources()["CPU"])
with open_launcher(LaunchSpec(kind="ray")) as launcher:
    evaluate_access(make_access(), QUICK, launcher=launcher)
print(ray.is_initialized())
ray.shutdown()
theirs.communicate("")
print(theirs.returncode)
try:
    with open_launcher(LaunchSpec(kind="ray", address=address)):
        pass
except LaunchError as error:
    print(str(error).startswith(f"launch.address={address}: "))
""",
        short_path,
    )
    assert told.splitlines() == ["0", "False None", "[True] 2.0", "True", "0", "True"]


@pytest.mark.ray
@needs_ray
def test_waiting_for_a_processor_is_said(workers, monkeypatch, caplog):
    from amici_eval.evaluation import launching

    class TiredError(Exception):
        pass

    def stop_once_it_is_said(*_: object) -> None:
        if any("wait for a free processor" in line for line in caplog.messages):
            raise TiredError

    workers.prepare(2)
    monkeypatch.setattr(launching, "_PATIENCE_S", 1.0)
    with launching.RayLauncher(LaunchSpec(kind="ray")) as others, pytest.raises(TiredError):
        evaluate_access(make_access(), QUICK, launcher=others, progress=stop_once_it_is_said)
    assert "2 of 2 workers wait for a free processor: the cluster has 2" in caplog.messages


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.amici
@needs_ray
def test_the_command_evaluates_over_workers(registry, tmp_path):
    import mlflow

    from amici_eval.tracking.jobs.evaluating import load_evaluation
    from amici_eval.tracking.runs.unfinished import FINGERPRINT_TAG

    quick = ("model_uri=models:/tiny/1", "permutation.n_permutations=19", "report.figures=false", "ablation.device=cpu")
    runs = []
    for launch in (["launch=local"], ["launch=ray", "launch.n_workers=2"]):
        name = f"tracking.run_name={launch[0][7:]}"
        done = subprocess.run(
            [sys.executable, "-m", "amici_eval", "evaluate", *quick, *launch, name],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (run_id,) = re.findall(r"^run (\w+) in ", done.stdout, flags=re.MULTILINE)
        runs.append((load_evaluation(run_id), mlflow.get_run(run_id)))
    (here, logged), (there, logged_there) = runs
    assert differences(here, there) == []
    assert logged.data.metrics == logged_there.data.metrics
    assert logged.data.tags[FINGERPRINT_TAG] == logged_there.data.tags[FINGERPRINT_TAG]


@pytest.mark.amici
def test_without_ray_nothing_is_started(registry, capsys, monkeypatch):
    import mlflow

    def count() -> int:
        return len(mlflow.search_runs(search_all_experiments=True, output_format="list"))

    before = count()
    monkeypatch.setitem(sys.modules, "ray", None)
    assert call("evaluate", "model_uri=models:/tiny/1", "launch=ray", "ablation.device=cpu") == 2
    told = capsys.readouterr().err
    assert "launch=ray needs the extra; pip install 'amici-eval[ray]'" in told
    assert count() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "slurm"}, r"launch\.kind='slurm': it must be one of local, ray"),
        ({"kind": "ray", "n_workers": 0}, r"launch\.n_workers=0"),
        ({"kind": "ray", "retries": -1}, r"launch\.retries=-1"),
        ({"kind": "ray", "address": "ray://head:10001"}, r"launch\.address='ray://head:10001'.*host:port"),
        ({"n_workers": 2}, "one process has neither; set launch=ray"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(InvalidSpecError, match=message):
        LaunchSpec(**settings)


def test_another_device_is_refused():
    LaunchSpec().check_device("cuda")
    LaunchSpec(kind="ray").check_device("cpu")
    with pytest.raises(DeviceError, match=r"set ablation\.device=cpu"):
        LaunchSpec(kind="ray").check_device("mps")
