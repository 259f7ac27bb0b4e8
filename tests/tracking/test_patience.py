"""What an error is: one that passes, bad input, or ours; and bad input that is found before any work."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import ModuleType

import pytest
import requests
import sqlalchemy.exc
from alembic.util.exc import CommandError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import (
    BAD_REQUEST,
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    TEMPORARILY_UNAVAILABLE,
)

from amici_eval.cli.commands import main
from amici_eval.common.errors import (
    AmiciEvalError,
    DataError,
    InvalidSpecError,
    ModelNotFoundError,
    OutputError,
    TrackingError,
)
from amici_eval.tracking import store
from amici_eval.tracking.dataset import fetch
from amici_eval.tracking.store import tracking_errors, understood


def from_(error, cause):
    error.__cause__ = cause
    return error


def database(kind, words, **origin):
    source = type("Error", (Exception,), origin)(words)
    return from_(
        MlflowException(words, error_code=TEMPORARILY_UNAVAILABLE),
        kind("INSERT INTO metrics (key) VALUES (?)", {}, source),
    )


def sqlite(words, kind=sqlite3.OperationalError):
    wrapped = {
        sqlite3.OperationalError: sqlalchemy.exc.OperationalError,
        sqlite3.DatabaseError: sqlalchemy.exc.DatabaseError,
    }
    return from_(MlflowException(words, error_code=TEMPORARILY_UNAVAILABLE), wrapped[kind]("SELECT 1", {}, kind(words)))


def number(code, words=""):
    error = database(sqlalchemy.exc.OperationalError, words)
    error.__cause__.orig.args = (code, words)
    return error


def answer(status, content=b"<html>", *, history=()):
    made = requests.Response()
    made.status_code, made._content, made.url, made.history = status, content, "http://store/login", list(history)
    made.request = requests.Request("GET", "http://store/api/2.0/mlflow/runs/get").prepare()
    return made


def answered(status, content, error):
    """Return an error that was raised where an answer was at hand, as MLflow does it."""
    response = answer(status, content)
    assert response is not None
    try:
        raise error
    except type(error) as raised:
        return raised


PASSING = {
    "MLflow around a lost connection": from_(MlflowException("x"), requests.ConnectionError("reset")),
    "too many answers with 500": from_(MlflowException("x"), requests.exceptions.RetryError("too many 500")),
    "time out": requests.ReadTimeout("slow"),
    "a body that ended early": requests.exceptions.ChunkedEncodingError("short"),
    "a server that says 500": RestException({"error_code": "INTERNAL_ERROR", "message": "x"}),
    "a server that says 503": RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "x"}),
    "a server that says 429": RestException({"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "x"}),
    "502 of a proxy": requests.HTTPError("x", response=answer(502)),
    "a system that ends a connection": ConnectionResetError(errno.ECONNRESET, "reset"),
    "SQLite locked": sqlite("database is locked"),
    "PostgreSQL shuts down": database(sqlalchemy.exc.OperationalError, "shut down", pgcode="57P01"),
    "PostgreSQL in a deadlock": database(sqlalchemy.exc.OperationalError, "deadlock", sqlstate="40P01"),
    "PostgreSQL not there": database(sqlalchemy.exc.OperationalError, "could not connect to server"),
    "MySQL gone": number(2006, "gone away"),
    "MySQL lock": number(1205, "Lock wait timeout"),
    "no connection free": from_(MlflowException("x"), sqlalchemy.exc.TimeoutError("QueuePool limit")),
    "the row of a data set": MlflowException(
        "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name", error_code=BAD_REQUEST
    ),
}
LASTING = {
    "401 with a page": (answered(401, b"<html>", MlflowException("x")), TrackingError, "MLFLOW_TRACKING_USERNAME"),
    "403 with JSON of a gateway": (
        answered(403, b'{"message": "Forbidden"}', RestException({"message": "Forbidden"})),
        TrackingError,
        "Forbidden",
    ),
    "MLflow's own 403": (MlflowException("no", error_code=PERMISSION_DENIED), TrackingError, "ask for the permission"),
    "413": (requests.HTTPError("x", response=answer(413)), TrackingError, "client_max_body_size"),
    "a login page": (answered(200, b"<html>", MlflowException("not in a valid JSON")), TrackingError, "login page"),
    "a login page as artifacts": (requests.exceptions.JSONDecodeError("x", "<html>", 0), TrackingError, "login page"),
    "JSON of another service": (answered(200, b"[1]", KeyError("run")), TrackingError, "no answer of MLflow"),
    "redirections in a circle": (
        from_(MlflowException("x"), requests.TooManyRedirects("Exceeded 30 redirects")),
        TrackingError,
        "the MLflow server itself",
    ),
    "a certificate": (
        from_(MlflowException("x"), requests.exceptions.SSLError("self-signed")),
        TrackingError,
        "MLFLOW_TRACKING_SERVER_CERT_PATH",
    ),
    "not implemented": (requests.HTTPError("x", response=answer(501)), InvalidSpecError, "501"),
    "no run": (MlflowException("Run with id=7", error_code=RESOURCE_DOES_NOT_EXIST), ModelNotFoundError, "id=7"),
    "a bad value": (MlflowException("Invalid é", error_code=INVALID_PARAMETER_VALUE), InvalidSpecError, "Invalid é"),
    "without a code": (
        MlflowException("Detected\n\nout-of-date, run 'mlflow db upgrade'"),
        InvalidSpecError,
        "upgrade'",
    ),
    "no table": (sqlite("no such table: runs"), TrackingError, "mlflow db upgrade URI"),
    "no database": (sqlite("file is not a database", sqlite3.DatabaseError), TrackingError, "not a database"),
    "full": (sqlite("database or disk is full"), TrackingError, "make room"),
    "read-only": (sqlite("attempt to write a readonly database"), TrackingError, "another place"),
    "a password": (
        database(sqlalchemy.exc.OperationalError, "password authentication failed"),
        TrackingError,
        "authentication",
    ),
    "MySQL refuses": (number(1045, "Access denied"), TrackingError, "Access denied"),
    "a long value": (database(sqlalchemy.exc.DataError, "value too long"), TrackingError, "too long"),
    "names that differ by case": (
        MlflowException(
            "(pymysql.err.IntegrityError) (1062, \"Duplicate entry 'ev/a-0' for key 'latest_metrics.PRIMARY'\")\n"
            "[SQL: INSERT INTO latest_metrics (key, dataset_name) VALUES (...)]",
            error_code=BAD_REQUEST,
        ),
        TrackingError,
        "differ by more than case",
    ),
    "names that differ by case, from a database at hand": (
        from_(
            MlflowException("x", error_code=BAD_REQUEST),
            sqlalchemy.exc.IntegrityError(
                "INSERT INTO `params` (k) VALUES (?)", {}, Exception(1062, "Duplicate entry 'a' for key 'PRIMARY'")
            ),
        ),
        TrackingError,
        "differ by more than case",
    ),
    "a name that is taken": (
        from_(
            MlflowException("model a already exists", error_code=RESOURCE_ALREADY_EXISTS),
            sqlalchemy.exc.IntegrityError(
                "INSERT INTO registered_models", {}, Exception("UNIQUE constraint failed: x.y")
            ),
        ),
        InvalidSpecError,
        "already exists",
    ),
    "a driver": (
        ModuleNotFoundError("No module named 'psycopg'", name="psycopg"),
        TrackingError,
        "pip install psycopg",
    ),
    "tables of a newer MLflow": (CommandError("no revision '0123'"), TrackingError, "no revision '0123'"),
    **{
        f"the system: {errno.errorcode[code]}": (OSError(code, os.strerror(code), "/a/b"), OutputError, "/a/b")
        for code in (
            *(errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EISDIR, errno.ENOTDIR),
            *(errno.ENAMETOOLONG, errno.ENOENT, errno.EMFILE, errno.EIO, errno.EEXIST),
        )
    },
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes(name):
    fault = understood(PASSING[name])
    assert fault is not None
    assert fault.passing
    with pytest.raises(TrackingError, match="run the same command again"), tracking_errors():
        raise PASSING[name]


@pytest.mark.parametrize("name", LASTING)
def test_what_is_bad_input(name):
    error, kind, words = LASTING[name]
    with pytest.raises(AmiciEvalError) as caught, tracking_errors():
        raise error
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert "same command" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), TypeError("x"), ZeroDivisionError()], ids=repr)
def test_what_is_ours(error):
    assert understood(error) is None
    with pytest.raises(type(error)), tracking_errors():
        raise error


@pytest.mark.parametrize(
    ("name", "attributes", "passing"),
    [
        ("ClientError", {"response": {"ResponseMetadata": {"HTTPStatusCode": 403}}}, False),
        ("ClientError", {"response": {"ResponseMetadata": {"HTTPStatusCode": 503}}}, True),
        ("ResourceNotFoundError", {"status_code": 404}, False),
        ("TooManyRequests", {"code": 429}, True),
        ("InvalidResponse", {"response": answer(502)}, True),
        ("EndpointConnectionError", {}, True),
        ("NoCredentialsError", {}, False),
        ("ClientConnectorCertificateError", {}, False),
        ("ResponseStreamingError", {}, True),
        ("InvalidRetryConfigurationError", {}, False),
    ],
)
def test_what_the_client_of_an_object_store_says(name, attributes, passing, monkeypatch):
    client = ModuleType("botocore.exceptions")
    client.BotoCoreError = client.ClientError = type("BotoCoreError", (Exception,), {})
    monkeypatch.setitem(sys.modules, client.__name__, client)
    # as S3UploadFailedError of boto3 hides what it comes from
    error = MlflowException("x")
    error.__context__ = type(name, (client.BotoCoreError,), attributes)("said")
    fault = understood(error)
    assert (fault.passing, fault.kind) == (passing, TrackingError)
    assert "said" in fault.said
    assert ("same command" in fault.fix) == passing


def test_data_is_asked_for_again(tmp_path, monkeypatch):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(503 if len(asked) < 3 else 200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"data")

    monkeypatch.setattr(store, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(store, "_patience_s", [0.0])
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/a.h5ad"
        with pytest.raises(DataError, match=r"503.*run the same command again"):
            fetch(uri, tmp_path)
        store.set_patience(10.0)
        assert fetch(uri, tmp_path).read_bytes() == b"data"
        server.shutdown()
    assert len(asked) == 3


def test_files_that_were_fetched_in_threads_say_what_failed():
    def fetch():
        failed = {"a.json": MlflowException("x"), "b.json": requests.HTTPError("x", response=answer(403))}
        raise MlflowException(f"failures while downloading {sorted(failed)}")

    with pytest.raises(TrackingError, match="ask for the permission"), tracking_errors():
        fetch()


def test_our_own_fault_is_called_so_and_kept_in_a_file(bare_model, monkeypatch, capsys, tmp_path):
    def fail(*_, **__):
        raise KeyError("surprise")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("amici_eval.tracking.jobs.promotion.rollback", fail)
    with pytest.raises(SystemExit) as end:
        main(["rollback", f"model={bare_model.name}", f"tracking.uri={bare_model.uri}"])
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert "KeyError: 'surprise': this is a fault of amici_eval" in said
    assert "Traceback" not in said
    assert "HYDRA_FULL_ERROR" not in said
    (kept,) = tmp_path.glob("amici-eval-fault-*.txt")
    assert str(kept) in said
    assert "Traceback" in kept.read_text()


def _other_schema(uri, tmp_path):
    shutil.copy(uri.removeprefix("sqlite:///"), tmp_path / "other.db")
    with closing(sqlite3.connect(tmp_path / "other.db")) as store:
        store.execute("update alembic_version set version_num = '0123456789ab'")
        store.commit()
    return f"sqlite:///{tmp_path / 'other.db'}"


def _no_database(uri, tmp_path):
    (tmp_path / "text.db").write_text("no database " * 100)
    return f"sqlite:///{tmp_path / 'text.db'}"


def _folder(uri, tmp_path):
    (tmp_path / "folder.db").mkdir()
    return f"sqlite:///{tmp_path / 'folder.db'}"


def _old_folder(uri, tmp_path):
    from mlflow.cli import cli

    if "migrate-filestore" not in cli.commands:
        pytest.skip("this version of MLflow reads folders of runs")
    (tmp_path / "mlruns").mkdir()
    return str(tmp_path / "mlruns")


STORES = {
    "another schema": (_other_schema, "mlflow db upgrade"),
    "no database": (_no_database, "file is not a database"),
    "a folder": (_folder, "unable to open database file"),
    "an old folder of runs": (_old_folder, "mlflow migrate-filestore"),
    "a misspelt scheme": (lambda uri, _: uri.replace("sqlite", "sqlit"), "sqlit:"),
    "a driver that is not there": (lambda *_: "mssql+pymssql:///x", "pip install pymssql"),
}


@pytest.mark.parametrize("name", STORES)
def test_a_store_that_cannot_be_used_is_refused_at_once(name, bare_model, tmp_path, capsys):
    store, words = STORES[name]
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "model_uri=models:/a/1", f"tracking.uri={store(bare_model.uri, tmp_path)}"])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert words in said
    assert "Traceback" not in said
    assert "same command again" not in said


@pytest.mark.parametrize(
    ("command", "setting", "words"),
    [
        ("evaluate", "tracking.experiment=gone", "'gone' is deleted"),
        ("evaluate", "MLFLOW_EXPERIMENT_NAME=gone", "mlflow experiments restore --experiment-id"),
        *((one, f"MLFLOW_RUN_ID={'0a' * 16}", f"MLFLOW_RUN_ID={'0a' * 16}") for one in ("evaluate", "watch")),
        ("evaluate", "MLFLOW_RUN_ID=../x", "../x"),
        *((one, "MLFLOW_EXPERIMENT_ID=4242", "MLFLOW_EXPERIMENT_ID=4242") for one in ("register", "compare", "gate")),
    ],
)
def test_where_results_cannot_go_is_found_before_any_work(command, setting, words, bare_model, monkeypatch, capsys):
    client = MlflowClient(bare_model.uri)
    if (gone := client.get_experiment_by_name("gone")) is None:
        client.delete_experiment(client.create_experiment("gone"))
    else:
        assert gone.lifecycle_stage == "deleted"
    what = {
        "register": ("model_dir=none", "name=new"),
        "compare": (f"model={bare_model.name}", "versions=[1,2]"),
        "watch": (f"model={bare_model.name}", "--once"),
    }.get(command, (f"model_uri=models:/{bare_model.name}/1",))
    if setting.startswith("MLFLOW"):
        monkeypatch.setenv(*setting.split("=", 1))
    else:
        what = (*what, setting)
    # an experiment that an earlier test chose would be MLflow's current one
    with pytest.raises(SystemExit) as end:
        main([command, *what, f"tracking.uri={bare_model.uri}"])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert words in said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["", "breast.v2", "a/b", "a:b", "a@b", "100%", "it's", '"x"', ".."])
def test_names_that_mlflow_refuses_are_found_before_any_work(name, bare_model):
    from amici_eval.settings.evaluation import TrackingSpec
    from amici_eval.tracking.jobs.evaluating import register_job

    options = {"data_uri": None, "adata": None, "trust": False, "alias": None}
    with pytest.raises(InvalidSpecError, match="name=") as caught:
        register_job("none", name=name, tracking=TrackingSpec(uri=bare_model.uri), **options)
    assert json.dumps(caught.value.rule) != '""'
