from __future__ import annotations

import re
import socket
import time

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils import validation

from amici_eval.common.errors import DataError, InvalidSpecError, ModelNotFoundError, TrackingError
from amici_eval.settings.checks import check_alias
from amici_eval.tracking.flavor import log_model, open_stored_model
from amici_eval.tracking.jobs.evaluating import find_dataset
from amici_eval.tracking.registry import check_model_name, connect, resolve_model

pytestmark = pytest.mark.amici


@pytest.mark.parametrize("uri", ["models:/tiny/1", "models:/tiny@champion"])
def test_registered_uris_lead_to_the_logged_model(registry, uri):
    model = resolve_model(uri)
    assert (model.name, model.version, model.model_id, model.run_id) == (
        "tiny",
        "1",
        registry.model_id,
        registry.run_id,
    )
    assert model.asked == uri


def test_latest_and_logged_model_uris(registry):
    assert resolve_model("models:/tiny/latest").version == "3"
    model = resolve_model(f"models:/{registry.model_id}")
    assert (model.name, model.model_id, model.run_id) == (None, registry.model_id, registry.run_id)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/tinny/1", r"no registered model 'tinny': the registry of sqlite:.* holds .*tiny.*; correct the name"),
        ("models:/tiny/9", r"no version '9': its versions are 1, 2, 3; name one of these"),
        ("models:/tiny/Production", r"no version 'Production'"),
        ("models:/tiny@best", r"no alias 'best': its aliases are champion -> 1; its versions 1, 2, 3"),
        ("models:/m-0123456789abcdef0123456789abcdef", r"no logged model m-0123456789abcdef0123456789abcdef"),
        ("models:/", r"is no model URI: write models:/NAME/VERSION"),
    ],
)
def test_what_is_not_there_says_what_is(registry, uri, message):
    with pytest.raises(ModelNotFoundError, match=message):
        resolve_model(uri)


def test_data_given_bundled_logged_or_missing(registry):
    for version, expected in (("1", str(registry.data)), ("2", "adata.h5ad")):
        model = resolve_model(f"models:/tiny/{version}")
        with open_stored_model(model.uri) as stored:
            assert find_dataset(model, stored, "given.h5ad") == "given.h5ad"
            assert str(find_dataset(model, stored, None)).endswith(expected)
    model = resolve_model("models:/tiny/3")
    with (
        open_stored_model(model.uri) as stored,
        pytest.raises(DataError, match=r"no data for models:/tiny/3: .*pass data.uri"),
    ):
        find_dataset(model, stored, None)


def test_relative_sqlite_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    try:
        assert connect("sqlite:///a.db") == f"sqlite:///{tmp_path / 'a.db'}"
        assert mlflow.get_tracking_uri() == f"sqlite:///{tmp_path / 'a.db'}"
    finally:
        mlflow.set_tracking_uri(before)


def _silent_port() -> tuple[socket.socket, int]:
    """Return a socket that takes connections and never answers."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener, listener.getsockname()[1]


def test_an_unreachable_store_is_told_within_30_s():
    listener, port = _silent_port()
    with listener:
        for uri in (
            "http://127.0.0.1:9",
            f"http://127.0.0.1:{port}",
            "postgresql://u:secret@127.0.0.1:9/db",
            "sqlite:////absent/a.db",
        ):
            begun = time.monotonic()
            with pytest.raises(TrackingError, match="cannot be reached") as caught:
                connect(uri)
            # a limit that the job promises, not a measure of speed
            assert time.monotonic() - begun < 30
            assert "secret" not in str(caught.value)


NAMES = ["a", "a b", "CD8+", "β", "", " ", "a/b", "a:b", ".", "..", "..a", "a.b", "50%", "it's", 'a"b', "a" * 300, "7"]


@pytest.mark.parametrize("name", NAMES)
def test_model_names_are_refused_by_mlflows_own_rule(name):
    for kind, rule in (
        ("registered", validation._validate_model_name),
        ("logged", validation._validate_logged_model_name),
    ):
        try:
            rule(name)
        except MlflowException:
            with pytest.raises(InvalidSpecError, match=rf"name={re.escape(repr(name))}: MLflow refuses it"):
                check_model_name("name", name, kind=kind)
        else:
            check_model_name("name", name, kind=kind)


def test_a_model_name_that_no_uri_can_hold_is_refused():
    with pytest.raises(InvalidSpecError, match="a model URI has the alias behind '@'"):
        check_model_name("name", "a@b")


@pytest.mark.parametrize(
    "alias",
    ["champion", "V2", "v1", "v1a", "latest", "LATEST", "a.b", "a b", "", "7", "β", "a" * 255, "a" * 256, "a-_b"],
)
def test_aliases_are_refused_by_mlflows_own_rule(alias):
    try:
        validation._validate_model_alias_name(alias)
        validation._validate_model_alias_name_reserved(alias)
    except MlflowException:
        with pytest.raises(InvalidSpecError, match="an alias has letters"):
            check_alias("register.alias", alias)
    else:
        check_alias("register.alias", alias)


@pytest.mark.parametrize("names", [{"registered_model_name": "a/b"}, {"name": "a.b"}])
def test_log_model_refuses_a_name_before_any_work(names):
    with pytest.raises(InvalidSpecError, match="MLflow refuses it"):
        log_model(None, **names)
