"""Find and tag models, versions and data in the tracking store; say what is there when one is not found."""

from __future__ import annotations

import logging
import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from amici_eval.common.errors import InvalidSpecError, ModelNotFoundError, TrackingError, first_line
from amici_eval.common.text import mask_secrets
from amici_eval.tracking.runs.tracked import PARENT_RUN_VARIABLE, close_abandoned
from amici_eval.tracking.store import (
    all_pages,
    asked_again,
    is_missing,
    optional,
    patiently,
    set_patience,
    store_errors,
    tracking_errors,
    version_numbers,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from amici_eval.settings.evaluation import TrackingSpec


logger = logging.getLogger(__name__)

_MODELS_SOUGHT, _MODELS_NAMED = 1000, 20
_TIMEOUTS_S = 5, 10
"""Seconds for a connection and for an answer, where ``MLFLOW_HTTP_REQUEST_TIMEOUT`` is not set."""
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>[^/@]+)|@(?P<alias>[^/@]+))/?")
_LOGGED = re.compile(r"models:/(?P<model_id>m-[0-9a-f]+)/?")


def connect(uri: str | None, *, retry_s: float = 0.0) -> str:
    """Choose the tracking store for this process, check that it answers, and close abandoned runs in it."""
    import mlflow

    absolute = _absolute_sqlite(uri or mlflow.get_tracking_uri())
    _check_reachable(absolute)
    mlflow.set_tracking_uri(absolute)
    # what is logged in the background can be lost without an error
    mlflow.config.enable_async_logging(enable=False)
    set_patience(retry_s)
    close_abandoned(mlflow.MlflowClient(tracking_uri=absolute))
    return absolute


def connect_to(tracking: TrackingSpec) -> str:
    """Connect to a store for a command that starts a run; refuse a run or an experiment that cannot be used."""
    uri = connect(tracking.uri, retry_s=tracking.retry_s)
    if PARENT_RUN_VARIABLE not in os.environ:
        _check_destination(tracking)
    return uri


@asked_again("finding the experiment")
def _check_destination(tracking: TrackingSpec) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    run_id, number = os.environ.get("MLFLOW_RUN_ID"), os.environ.get("MLFLOW_EXPERIMENT_ID", "")
    name = tracking.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    setting = f"MLFLOW_RUN_ID={run_id}" if run_id else f"MLFLOW_EXPERIMENT_ID={number}"
    try:
        if run_id:
            number, name = client.get_run(run_id).info.experiment_id, None
        by_id = name is None and number
        experiment = client.get_experiment(number) if by_id else client.get_experiment_by_name(name or "Default")
    except MlflowException as error:
        if not is_missing(error):
            raise
        raise InvalidSpecError(
            value=f"{setting}: the tracking store holds none of that id",
            rule="results must go to a run or an experiment that is there",
            fix="correct or unset the variable, or tracking.uri",
        ) from error
    # a new name makes an experiment
    if experiment is not None and experiment.lifecycle_stage == "deleted":
        raise InvalidSpecError(
            value=f"the experiment {experiment.name!r} is deleted",
            rule="results must go to an experiment that is there",
            fix=f"restore it (mlflow experiments restore --experiment-id {experiment.experiment_id}), or name another "
            "with tracking.experiment=...",
        )


def _absolute_sqlite(uri: str) -> str:
    prefix = "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(prefix + "/") and ":memory:" not in uri:
        return prefix + str(Path(uri.removeprefix(prefix)).absolute())
    return uri


def _check_reachable(uri: str) -> None:
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    parsed = urlparse(uri)
    scheme = parsed.scheme.partition("+")[0]
    try:
        if scheme in ("http", "https"):
            # any answer will do: 401 and 404 come from a server that is there
            http_request(
                get_default_host_creds(uri),
                "/health",
                "GET",
                timeout=None if MLFLOW_HTTP_REQUEST_TIMEOUT.is_set() else _TIMEOUTS_S,
                # a connection that is closed once is no server that is gone, whatever the variable says
                max_retries=(MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() or 1)
                if MLFLOW_HTTP_REQUEST_MAX_RETRIES.is_set()
                else 1,
                raise_on_status=False,
            )
            return
        if scheme in _PORTS and parsed.hostname:
            address = (parsed.hostname, parsed.port or _PORTS[scheme])
            socket.create_connection(address, timeout=_TIMEOUTS_S[0]).close()
        elif scheme == "sqlite":
            folder = Path(uri.removeprefix("sqlite:///")).parent
            if not folder.is_dir():
                message = f"no folder {folder}"
                raise OSError(message)
    except (OSError, ValueError, MlflowException) as error:
        raise TrackingError(
            value=f"tracking store {uri} cannot be reached ({first_line(error)})",
            rule="the store must answer before any work starts",
            fix="start the server, or correct tracking.uri or MLFLOW_TRACKING_URI; for a slow one, set "
            "MLFLOW_HTTP_REQUEST_TIMEOUT",
        ) from error
    if scheme == "sqlite" or scheme in _PORTS:
        from mlflow.store.db.utils import create_sqlalchemy_engine

        # MLflow itself tries for minutes, whatever the database says
        with tracking_errors(), create_sqlalchemy_engine(uri).connect():
            pass


def keep_artifacts_in(folder: Path, *, uri: str, experiment: str) -> None:
    """Make an experiment whose artifacts lie in a folder, unless it is there; MLflow's default is ./mlruns."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    if client.get_experiment_by_name(experiment) is None:
        client.create_experiment(experiment, artifact_location=folder.as_uri())


def check_model_name(setting: str, name: str, *, kind: str = "registered") -> None:
    """Refuse a name that MLflow refuses for a registered or logged model, or that a model URI cannot hold."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils import validation

    try:
        getattr(validation, "_validate_model_name" if kind == "registered" else "_validate_logged_model_name", str)(
            name
        )
        refused = "a model URI has the alias behind '@'" if kind == "registered" and "@" in name else ""
        if set(name or "") & {"/", ":"}:  # old versions of MLflow take such a name, and then cannot find it
            refused = "MLflow refuses it (names cannot contain '/' or ':')"
    except MlflowException as error:
        refused = f"MLflow refuses it ({first_line(error)})"
    if refused:
        raise InvalidSpecError(value=f"{setting}={name!r}", rule=refused, fix="choose letters, digits, '_' and '-'")


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model in the tracking store.

    ``uri``: where to fetch it (the logged model behind a registered version); ``asked``: the URI as the user wrote it;
    ``name`` and ``version``: set if it was asked for as a registered version; ``run_id``: the run that logged it.
    """

    uri: str
    asked: str
    model_id: str | None = None
    name: str | None = None
    version: str | None = None
    run_id: str | None = None

    def describe(self) -> dict[str, Any]:
        """Return what identifies the model, as plain values for results."""
        return {
            "uri": mask_secrets(self.asked),
            "name": self.name,
            "version": self.version,
            "model_id": self.model_id,
            "run_id": self.run_id,
        }


@asked_again("finding the model")
def resolve_model(model_uri: str) -> ResolvedModel:
    """Find the logged model that a URI means."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    if match := _LOGGED.fullmatch(model_uri):
        model_id = match["model_id"]
        try:
            logged = client.get_logged_model(model_id)
        except MlflowException as error:
            if not is_missing(error):
                raise
            raise ModelNotFoundError(
                value=f"{model_uri}: there is no logged model {model_id}",
                rule="the id must be one of this tracking store",
                fix="check the id and tracking.uri",
            ) from error
        return ResolvedModel(uri=model_uri, asked=model_uri, model_id=model_id, run_id=logged.source_run_id)
    if match := _REGISTERED.fullmatch(model_uri):
        version = _registered_version(client, match["name"], match["version"], match["alias"], model_uri)
        logged_id = _LOGGED.fullmatch(version.source or "")
        return ResolvedModel(
            uri=f"models:/{version.name}/{version.version}",
            asked=model_uri,
            model_id=version.model_id or (logged_id["model_id"] if logged_id else None),
            name=version.name,
            version=str(version.version),
            run_id=version.run_id,
        )
    if model_uri.startswith("models:"):
        raise ModelNotFoundError(
            value=f"{model_uri!r} is no model URI",
            rule="write models:/NAME/VERSION, models:/NAME@ALIAS or models:/m-ID",
            fix="correct model_uri",
        )
    run_id = model_uri.split("/")[1] if model_uri.startswith("runs:/") else None
    return ResolvedModel(uri=model_uri, asked=model_uri, run_id=run_id)


def _registered_version(client: Any, name: str, version: str | None, alias: str | None, model_uri: str) -> Any:
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        registered = client.get_registered_model(name)
    except MlflowException as error:
        if not is_missing(error):
            raise
        known: list[str] = []
        with suppress(*store_errors()):
            known = [one.name for one in islice(all_pages(client.search_registered_models), _MODELS_SOUGHT)]
        near = get_close_matches(name, known, n=3)
        known = [*near, *(one for one in known if one not in near)][:_MODELS_NAMED]
        raise ModelNotFoundError(
            value=f"{model_uri}: there is no registered model {name!r}",
            rule=f"the registry of {mlflow.get_tracking_uri()} holds {', '.join(known) or 'no models'}",
            fix="correct the name or tracking.uri, or register it with amici-eval register",
        ) from error
    versions = version_numbers(client, name)
    shown = ", ".join(map(str, versions)) or "none"
    if alias is not None:
        if alias not in registered.aliases:
            aliases = ", ".join(f"{key} -> {value}" for key, value in registered.aliases.items()) or "none"
            raise ModelNotFoundError(
                value=f"{model_uri}: model {name!r} has no alias {alias!r}",
                rule=f"its aliases are {aliases}; its versions {shown}",
                fix="set the alias or name a version",
            )
        version = str(registered.aliases[alias])
    if version == "latest" and versions:
        version = str(versions[-1])
    if version is None or not version.isdigit() or int(version) not in versions:
        raise ModelNotFoundError(
            value=f"{model_uri}: model {name!r} has no version {version!r}",
            rule=f"its versions are {shown}",
            fix="name one of these",
        )
    return client.get_model_version(name, version)


@asked_again("finding the logged model")
def known_model_id(model_id: str | None) -> str | None:
    """Return the id of a logged model if this store holds it: a folder may come from another one."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if model_id is not None:
        try:
            MlflowClient().get_logged_model(model_id)
        except MlflowException as error:
            if not is_missing(error):
                raise
            logger.warning("logged model %s is not in this tracking store; the run will not be linked to it", model_id)
            return None
    return model_id


def tag_version(model: ResolvedModel, tags: Mapping[str, str], what: str) -> None:
    """Tag a registered version, if the model is one; a user may be allowed to read it and not to tag it."""
    from mlflow import MlflowClient

    if model.name is None or model.version is None:
        return
    tag = partial(MlflowClient().set_model_version_tag, model.name, model.version)
    with optional(f"version {model.version} could not be tagged with {what}"):
        for name, value in tags.items():
            patiently(partial(tag, name, value), what="tagging the version")
