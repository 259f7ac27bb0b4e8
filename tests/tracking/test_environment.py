"""MLflow's environment variables: runs that others opened, logging in the background, TLS, slow and crowded servers."""

from __future__ import annotations

import base64
import datetime
import http.server
import ipaddress
import os
import ssl
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import mlflow
import pytest
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.exceptions import MlflowException, RestException
from mlflow.store.entities import PagedList
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from omegaconf import OmegaConf

from amici_eval.common.errors import InvalidSpecError, ModelNotFoundError, TrackingError
from amici_eval.settings.evaluation import TrackingSpec
from amici_eval.tracking import registry
from amici_eval.tracking.registry import connect, connect_to
from amici_eval.tracking.runs import delivery
from amici_eval.tracking.runs.local_results import ARTIFACTS
from amici_eval.tracking.runs.tracked import PARENT_RUN_VARIABLE, PARTIAL_TAG, close_abandoned, tracked_run
from amici_eval.tracking.runs.unfinished import FINGERPRINT_TAG, UnfinishedWork, find_evaluation
from amici_eval.tracking.store import version_numbers
from amici_eval.tracking.sweep import ParentRun, close_parent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PARENT_TAG = "mlflow.parentRunId"
EVALUATION = {"amici_eval.kind": "evaluation"}
RUN = "a run of amici-eval"


@pytest.fixture(autouse=True)
def _no_experiment_of_earlier_tests(monkeypatch) -> None:
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)


def opened(tags: dict[str, str] | None = None) -> str:
    """Return a run that a platform opened, in an experiment that is not the default one."""
    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name("of the platform")
    experiment = found.experiment_id if found else client.create_experiment("of the platform")
    return client.create_run(experiment, tags=tags).info.run_id


def fill(run_id: str, with_what: str) -> None:
    client = mlflow.MlflowClient()
    if with_what == "metrics":
        client.log_metric(run_id, "loss", 1.0)
    elif with_what == "params":
        client.log_param(run_id, "lr", 0.1)
    elif with_what == "artifacts":
        client.log_text(run_id, "x", "weights.txt")
    elif with_what == "data sets":
        dataset = MetaDataset(CodeDatasetSource({}), name="d")._to_mlflow_entity()
        client.log_inputs(run_id, [mlflow.entities.DatasetInput(dataset)])
    else:
        client.set_tag(run_id, "amici_eval.kind", "gate")


@pytest.mark.parametrize(
    ("held", "ended"),
    [
        ("metrics", False),
        ("metrics", True),
        *((one, False) for one in ("params", "artifacts", "data sets")),
        (RUN, True),
    ],
)
def test_a_run_that_holds_something_gets_a_child(bare_model, monkeypatch, caplog, held, ended):
    given = opened()
    fill(given, held)
    if ended:
        mlflow.MlflowClient().set_terminated(given)
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    before = mlflow.get_run(given)
    with caplog.at_level("INFO", "amici_eval"), tracked_run(TrackingSpec(), name="x", tags=EVALUATION) as run:
        pass
    after, child = mlflow.get_run(given), mlflow.get_run(run.info.run_id)
    assert after.to_dictionary() == before.to_dictionary()
    assert child.data.tags[PARENT_TAG] == given
    assert child.info.experiment_id == before.info.experiment_id
    assert child.info.status == "FINISHED"
    said = [one.getMessage() for one in caplog.records if given in one.getMessage()]
    assert said == [f"MLFLOW_RUN_ID names run {given}, which holds {held}: run {run.info.run_id} is a child of it"]


@pytest.mark.parametrize(
    ("tags", "params", "metrics"),
    [
        ({}, {}, {}),
        ({"team": "a", "mlflow.runName": "job"}, {}, {}),
        ({"mlflow.project.entryPoint": "main", "mlflow.source.type": "PROJECT"}, {"model_uri": "models:/a/1"}, {}),
        ({}, {}, {"system/cpu_utilization_percentage": 3.0}),
    ],
)
def test_an_empty_run_is_taken_over(bare_model, monkeypatch, tags, params, metrics):
    given = opened(tags)
    client = mlflow.MlflowClient()
    for name, value in params.items():
        client.log_param(given, name, value)
    for name, value in metrics.items():
        client.log_metric(given, name, value)
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    with tracked_run(TrackingSpec(), name="x", tags=EVALUATION) as run:
        assert run.info.run_id == given
    assert mlflow.get_run(given).data.tags.items() >= EVALUATION.items()


def test_a_variable_that_is_empty_names_no_run(bare_model, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "")
    assert connect_to(TrackingSpec(uri=bare_model.uri)) == bare_model.uri
    with tracked_run(TrackingSpec(), name="x", tags=EVALUATION) as run:
        assert PARENT_TAG not in run.data.tags


def test_all_commands_of_a_job_belong_to_its_run(bare_model, monkeypatch):
    given = opened()
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    runs = []
    for _ in range(3):
        with tracked_run(TrackingSpec(), name="x", tags=EVALUATION) as run:
            runs.append(run.info.run_id)
        assert os.environ["MLFLOW_RUN_ID"] == given
    assert runs[0] == given
    assert {mlflow.get_run(one).data.tags[PARENT_TAG] for one in runs[1:]} == {given}
    with tracked_run(TrackingSpec(experiment="mine"), name="x", tags={}) as run:
        pass
    # an experiment that the user names is the user's wish
    assert mlflow.get_experiment(run.info.experiment_id).name == "mine"
    assert mlflow.get_run(run.info.run_id).data.tags[PARENT_TAG] == given


def test_an_interrupted_child_goes_on(bare_model, monkeypatch, tmp_path):
    given = opened(EVALUATION)
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    tracking = TrackingSpec(output_dir="out")

    def work() -> UnfinishedWork:
        return UnfinishedWork(tracking, key="k", tracking_uri=bare_model.uri, n_types=2)

    def interrupted(one: UnfinishedWork) -> str:
        with one, tracked_run(tracking, name="x", tags=EVALUATION, go_on=one.run_id) as run:
            one.begin(run.info.run_id)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(work())
    (folder,) = (tmp_path / "out").iterdir()
    assert mlflow.get_run(folder.name).data.tags[PARENT_TAG] == given
    with work() as again, tracked_run(tracking, name="x", tags=EVALUATION, go_on=again.run_id) as run:
        assert run.info.run_id == folder.name
        again.begin(run.info.run_id)
    # in another job it is not taken into the run of that job's own
    (tmp_path / "out").mkdir(exist_ok=True)
    with pytest.raises(KeyboardInterrupt):
        interrupted(work())
    monkeypatch.setenv("MLFLOW_RUN_ID", opened())
    with work() as other:
        assert other.run_id is None


@pytest.mark.parametrize("gone", ["0" * 32, "deleted"])
def test_a_run_that_is_not_there_is_named(bare_model, monkeypatch, gone):
    if gone == "deleted":
        gone = opened()
        mlflow.MlflowClient().delete_run(gone)
    monkeypatch.setenv("MLFLOW_RUN_ID", gone)
    with (
        pytest.raises(InvalidSpecError, match=f"MLFLOW_RUN_ID={gone}.*unset MLFLOW_RUN_ID"),
        tracked_run(TrackingSpec(), name="x", tags={}),
    ):
        pytest.fail("nothing is computed")


@pytest.mark.parametrize("held", [True, False])
def test_a_sweep_is_a_child_too(bare_model, monkeypatch, held):
    given = opened()
    if held:
        fill(given, "metrics")
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", bare_model.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    config = OmegaConf.create({"tracking": {"uri": bare_model.uri, "experiment": None, "run_name": None}})
    ParentRun().on_multirun_start(config)
    sweep = os.environ[PARENT_RUN_VARIABLE]
    try:
        assert (sweep == given) is not held
        assert mlflow.get_run(sweep).data.tags.get(PARENT_TAG) == (given if held else None)
        with tracked_run(TrackingSpec(), name="job", tags=EVALUATION) as job:
            assert job.data.tags[PARENT_TAG] == sweep
    finally:
        close_parent("FINISHED")
    assert mlflow.get_run(sweep).info.status == "FINISHED"


@pytest.fixture(params=["environment", "python"])
def in_background(request, monkeypatch) -> None:
    """MLflow logs in the background, and the store takes nothing of it."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true" if request.param == "environment" else "false")
    if request.param == "python":
        mlflow.config.enable_async_logging()

    def lost(self, run_id, metrics, params, tags):
        # what MLflow does with an error in the background
        return SimpleNamespace(wait=lambda: None, _operation_futures=[])

    monkeypatch.setattr(SqlAlchemyStore, "log_batch_async", lost)


def test_results_are_not_logged_in_the_background(bare_model, in_background, tmp_path, monkeypatch):
    run_id = opened()
    record = delivery.RunRecord(
        tracking_uri=bare_model.uri,
        run_id=run_id,
        params={"cfg/a": "1"},
        metrics={"m": 0.5},
        tags=EVALUATION,
        series={"s": [(0, 0.1), (1, 0.2)]},
    )
    (tmp_path / ARTIFACTS).mkdir()
    delivery.send(tmp_path, record)
    held = mlflow.get_run(run_id).data
    assert held.params == {"cfg/a": "1"}
    assert held.metrics == {"m": 0.5, "s": 0.2}
    assert held.tags.items() >= EVALUATION.items()

    def full(*_: object, **__: object) -> None:
        raise MlflowException("no more")

    monkeypatch.setattr(SqlAlchemyStore, "log_batch", full)
    with pytest.raises(TrackingError, match="all results are safe in"):
        delivery.send(tmp_path, record)


def test_no_command_logs_in_the_background(bare_model, in_background, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", given := opened())
    connect(bare_model.uri)
    with tracked_run(TrackingSpec(), name="x", tags=EVALUATION):
        # of a run that is taken over MLflow logs the tags itself
        assert mlflow.get_run(given).data.tags.items() >= {**EVALUATION, PARTIAL_TAG: "in progress"}.items()
        mlflow.set_tag("more", "1")
        mlflow.log_metric("m", 1.0)
    data = mlflow.get_run(given).data
    assert data.tags["more"] == "1"
    assert data.metrics == {"m": 1.0}


class Handler(http.server.BaseHTTPRequestHandler):
    asked: list[tuple[str, dict[str, str]]]
    wait_s = 0.0
    failures = 0

    def do_GET(self) -> None:
        type(self).asked.append((self.path, dict(self.headers)))
        time.sleep(self.wait_s)
        type(self).failures -= 1
        self.send_response(503 if self.failures >= 0 else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stub(monkeypatch) -> Iterator[tuple[http.server.ThreadingHTTPServer, type[Handler]]]:
    """A server that answers everything with nothing, and the handler that notes what it was asked."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_TRACKING", "MLFLOW_HTTP", "MLFLOW_EXPERIMENT", "REQUESTS_CA", "CURL_CA")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    before = mlflow.get_tracking_uri()
    handler = type("Noting", (Handler,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server, handler
        finally:
            server.shutdown()
            mlflow.set_tracking_uri(before)


def certificate(folder: Path) -> Path:
    """Write a key and a self-signed certificate for this machine into one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    pem, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(
        key.private_bytes(pem, kind, serialization.NoEncryption()) + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.mark.parametrize(
    ("name", "trusted"),
    [
        ("MLFLOW_TRACKING_INSECURE_TLS", True),
        ("MLFLOW_TRACKING_SERVER_CERT_PATH", True),
        ("REQUESTS_CA_BUNDLE", True),
        (None, False),
    ],
)
@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_certificates_that_mlflow_is_told_to_trust_are_trusted(stub, tmp_path, monkeypatch, name, trusted):
    server, handler = stub
    pem = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    if name is not None:
        monkeypatch.setenv(name, "true" if name.endswith("INSECURE_TLS") else str(pem))
    uri = f"https://127.0.0.1:{server.server_port}"
    if trusted:
        assert connect(uri) == uri
        assert handler.asked[0][0] == "/health"
    else:
        with pytest.raises(TrackingError, match=r"cannot be reached.*CERTIFICATE_VERIFY_FAILED"):
            connect(uri)
        assert handler.asked == []


@pytest.mark.parametrize(
    ("variables", "header"),
    [
        ({"MLFLOW_TRACKING_TOKEN": "t"}, "Bearer t"),
        (
            {"MLFLOW_TRACKING_USERNAME": "u", "MLFLOW_TRACKING_PASSWORD": "p"},
            f"Basic {base64.b64encode(b'u:p').decode()}",
        ),
    ],
)
def test_the_first_look_gives_the_same_credentials_as_mlflow(stub, monkeypatch, variables, header):
    server, handler = stub
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    connect(f"http://127.0.0.1:{server.server_port}")
    assert {headers.get("Authorization") for _, headers in handler.asked} == {header}


@pytest.mark.parametrize(
    "variables",
    [
        {"MLFLOW_TRACKING_INSECURE_TLS": "true", "MLFLOW_TRACKING_SERVER_CERT_PATH": "a.pem"},
        {"MLFLOW_TRACKING_INSECURE_TLS": "perhaps"},
        {"MLFLOW_HTTP_REQUEST_TIMEOUT": "soon"},
        {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "-1"},
        {"MLFLOW_TRACKING_CLIENT_CERT_PATH": "absent.pem"},
    ],
)
def test_variables_that_mlflow_refuses_are_named(stub, monkeypatch, variables):
    server, _ = stub
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    scheme = "https" if "MLFLOW_TRACKING_CLIENT_CERT_PATH" in variables else "http"
    with pytest.raises(TrackingError, match="cannot be reached"):
        connect(f"{scheme}://127.0.0.1:{server.server_port}")


@pytest.mark.parametrize(("timeout", "answered"), [("1", False), ("20", True), (None, True)])
def test_a_slow_server_has_the_time_that_mlflow_gives_it(stub, monkeypatch, timeout, answered):
    server, handler = stub
    handler.wait_s = 1.5
    monkeypatch.setattr(registry, "close_abandoned", lambda client: [])
    if timeout is not None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", timeout)
        monkeypatch.setattr(registry, "_TIMEOUTS_S", (0.1, 0.1))
    uri = f"http://127.0.0.1:{server.server_port}"
    if answered:
        assert connect(uri) == uri
    else:
        with pytest.raises(TrackingError, match="MLFLOW_HTTP_REQUEST_TIMEOUT"):
            connect(uri)


def test_a_server_that_is_starting_is_asked_as_often_as_mlflow_is_told_to(stub, monkeypatch):
    server, handler = stub
    handler.failures = 2
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    connect(f"http://127.0.0.1:{server.server_port}")
    assert [path for path, _ in handler.asked[:3]] == ["/health"] * 3


class Crowded:
    """A store of many experiments that takes only short lists of them and answers page by page."""

    def __init__(self, *, holds: dict[str, list[str]], n: int = 2345, refuses: bool = False) -> None:
        self.ids = [str(number) for number in range(n)]
        self.holds, self.refuses = holds, refuses
        self.asked: list[list[str]] = []
        self.closed: list[str] = []

    def _page(self, found: list, size: int, token: str | None) -> PagedList:
        start = int(token or 0)
        return PagedList(found[start : start + size], str(start + size) if start + size < len(found) else None)

    def search_experiments(self, *, page_token: str | None = None) -> PagedList:
        return self._page([SimpleNamespace(experiment_id=one) for one in self.ids], 1000, page_token)

    def search_runs(self, ids, condition, *, order_by=None, page_token=None) -> PagedList:
        self.asked.append(ids)
        if len(ids) > 100 or (self.refuses and len(ids) > 1):
            raise RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "too many experiment_ids"})
        beat = '{"host": "a", "boot": "", "namespace": "", "started": "", "pid": 1, "time": 1}'
        data = SimpleNamespace(tags={"amici_eval.heartbeat": beat})
        runs = [SimpleNamespace(info=SimpleNamespace(run_id=r), data=data) for i in ids for r in self.holds.get(i, [])]
        return self._page(runs, 2, page_token)

    def search_model_versions(self, condition, *, page_token=None) -> PagedList:
        return self._page([SimpleNamespace(version=str(number)) for number in range(7, 0, -1)], 2, page_token)

    def set_terminated(self, run_id: str, status: str) -> None:
        self.closed.append(run_id)

    def set_tag(self, *_: object) -> None:
        pass


def test_an_evaluation_is_found_among_thousands_of_experiments(monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    for store, found in (
        (Crowded(holds={"7": ["own"], "2344": ["other"]}), "own"),
        (Crowded(holds={"2344": ["other"]}), "other"),
        (Crowded(holds={"7": ["own"], "2344": ["other"]}, refuses=True), "own"),
        (Crowded(holds={}), None),
    ):
        monkeypatch.setattr(mlflow, "MlflowClient", lambda store=store: store)
        assert find_evaluation("f") == found
        assert store.asked[0] == ["7"]
        assert found == "own" or sorted(one for ids in store.asked for one in ids) == sorted(store.ids)


@pytest.mark.parametrize("error", [None, ConnectionError("gone"), MlflowException("gone")])
def test_a_refused_search_finds_nothing_and_says_so(monkeypatch, caplog, error):
    store = Crowded(holds={"3": ["there"]}, refuses=True)
    if error is not None and isinstance(error, MlflowException):

        def broken(*_: object, **__: object) -> None:
            raise error

        store.search_experiments = broken
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    monkeypatch.setattr(mlflow, "MlflowClient", lambda: store)
    assert find_evaluation("f") is None
    assert "the store refused to search for an earlier evaluation" in caplog.text


def test_runs_of_others_are_closed_wherever_they_are_in_limited_time(monkeypatch):
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    many = [f"r{number}" for number in range(5)]
    assert close_abandoned(Crowded(holds={"2344": many})) == many
    store = Crowded(holds={"2344": many})
    monkeypatch.setattr("amici_eval.tracking.runs.tracked._SEARCH_S", -1.0)
    assert close_abandoned(store) == []
    assert store.asked == []


def test_all_versions_of_a_model_are_found():
    assert version_numbers(Crowded(holds={}), "a") == [1, 2, 3, 4, 5, 6, 7]


def test_a_registry_that_lists_no_models_still_says_which_is_missing(bare_model, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise MlflowException("not allowed")

    monkeypatch.setattr(mlflow.MlflowClient, "search_registered_models", refused)
    with pytest.raises(ModelNotFoundError, match="there is no registered model 'absent'"):
        registry.resolve_model("models:/absent/1")


def test_an_evaluation_outside_the_current_experiment_is_found_in_a_real_store(bare_model, monkeypatch):
    client = mlflow.MlflowClient()
    for number in range(120):
        client.create_experiment(f"crowd {number}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.get_experiment_by_name("crowd 50").experiment_id)
    run = client.create_run(client.get_experiment_by_name("crowd 3").experiment_id, tags={FINGERPRINT_TAG: "f" * 32})
    assert find_evaluation("f" * 32) is None
    client.set_terminated(run.info.run_id)
    assert find_evaluation("f" * 32) == run.info.run_id
