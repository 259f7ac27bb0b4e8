"""Ask a tracking store: classify errors, try again after those that pass, search page by page."""

from __future__ import annotations

import errno
import logging
import math
import os
import random
import re
import sqlite3
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlparse

from amici_eval.common.errors import (
    AmiciEvalError,
    InvalidSpecError,
    ModelNotFoundError,
    OutputError,
    TrackingError,
    first_line,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 20.0
_EXPERIMENTS_AT_A_TIME = 100
_PER_BATCH = {"params": 100, "tags": 100, "metrics": 1000}
_LONGEST_MESSAGE = 2000
_patience_s = [0.0]
"""For how many seconds calls of this process are tried again, as `set_patience` has set it."""

_MISSING = {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"}
# SQLSTATE: connection, deadlock, resources, shutdown; lock not available. MySQL: the same
_PASSING_SQLSTATE = ("08", "40", "53", "57", "55P03")
_PASSING_MYSQL = {1040, 1053, 1205, 1213, 2002, 2003, 2006, 2013, 2055}
# PostgreSQL gives no number before there is a connection
_NO_LOGIN = ("authentication", "does not exist", "denied", "pg_hba", "permission")
_SQLITE = {"is full": errno.ENOSPC, "readonly": errno.EROFS, "read-only": errno.EROFS, "to open": errno.EACCES}
_TABLE = re.compile(r"INSERT INTO [`\"\[]?(\w+)|constraint failed: (\w+)|for key '(\w+)\.|constraint \"(\w+)")

# modules of error classes: MLflow's migrations, and clients of the object stores that hold artifacts or data
_CLIENTS = {
    "alembic.util.exc": ("CommandError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "boto3.exceptions": ("Boto3Error",),
    "azure.core.exceptions": ("AzureError",),
    "google.api_core.exceptions": ("GoogleAPIError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "google.resumable_media.common": ("InvalidResponse",),
    "gcsfs.retry": ("HttpError",),
    "aiohttp": ("ClientError",),
}
_LOST = re.compile(
    r"Connect|Timeout|Transport|ServiceRe|IncompleteRead|Protocol|HTTPClient|Streaming|Payload|^RetryError"
)
_UNSAFE = re.compile(r"SSL|Certificate")

_RULES: dict[str | int, tuple[str, str]] = {
    "HTTP 401": ("the server must know who asks", "give MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN"),
    "HTTP 403": ("your account must be allowed to do this", "ask for the permission, or use another account"),
    "HTTP 404": ("it must be there, on an MLflow server", "check tracking.uri, and whether it was deleted"),
    "HTTP 407": ("the proxy must know who asks", "give its credentials in HTTPS_PROXY, or name the server in NO_PROXY"),
    "HTTP 413": ("the server must take requests of that size", "raise its limit (nginx: client_max_body_size)"),
    "HTTP 507": ("the server must have room", "make room there"),
    "missing": ("it must be in the store", "check the name or id, the version and tracking.uri"),
    "no MLflow": (
        "the address must be that of the MLflow server itself",
        "correct tracking.uri (a login page, a proxy or another service answers there), or log in",
    ),
    "no address": ("tracking.uri must be a web address", "correct tracking.uri or MLFLOW_TRACKING_URI"),
    "certificate": (
        "this machine must trust the certificate of the server",
        "name the file of its authority in MLFLOW_TRACKING_SERVER_CERT_PATH, or correct tracking.uri",
    ),
    "database": (
        "it must be a database that MLflow can read and write",
        "correct tracking.uri; a database of an older MLflow needs: mlflow db upgrade URI; of a newer: that MLflow",
    ),
    "collision": (
        "rows of one run must differ; some databases take names that differ by case only for the same",
        "let the names differ by more than case, or use a database that tells them apart",
    ),
    "object store": (
        "the store of the artifacts or data must know and serve this environment",
        "check its address, and the credentials, rights and certificates that its client finds here",
    ),
    "file": ("it must be whole, and you must be allowed to read and write it", "mend it, or name another place"),
    "refused": ("MLflow refuses this", "do what it says"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), ("you must be allowed to read and write it", "change its permissions")
    ),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), ("there must be room for it", "make room")),
    errno.EROFS: ("it must be on a file system that can be written", "name another place"),
    errno.EISDIR: ("it must be a file and is a folder", "name a file"),
    errno.ENOTDIR: ("each folder of its path must be one", "correct the path"),
    errno.EEXIST: ("the place must be free", "name another place"),
    errno.ENAMETOOLONG: ("a name has at most 255 bytes", "choose a shorter name"),
    errno.ENOENT: ("it must be there", "correct the path"),
    errno.EMFILE: ("a process must be able to open more files", "raise the limit (ulimit -n)"),
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An error of a store or a file system: its message, rule, fix, our error class, and whether it passes."""

    said: str
    rule: str = "it must answer until the command is through"
    fix: str = "run the same command again when it is back: what is finished is taken up"
    passing: bool = True
    kind: type[AmiciEvalError] = TrackingError


def _refused(said: str, why: str | int, kind: type[AmiciEvalError] = TrackingError) -> Fault:
    rule, fix = _RULES[why]
    return Fault(said=said, rule=rule, fix=fix, passing=False, kind=kind)


def set_patience(seconds: float) -> None:
    """Set for how many seconds later calls of this process to the store are tried again."""
    _patience_s[0] = seconds


def patiently(action: Callable[[], Result], *, seconds: float | None = None, what: str) -> Result:
    """Try an action again until it succeeds, fails for good, or ``seconds`` are over (``None``: of `set_patience`)."""
    until, wait = None, _FIRST_WAIT_S
    while True:
        try:
            return action()
        except Exception as error:
            # spread out: many jobs lose the same server at the same time
            pause = wait * random.uniform(0.7, 1.3)  # noqa: S311, RUF100 - no secret
            fault = understood(error)
            if until is None:
                until = time.monotonic() + (_patience_s[0] if seconds is None else seconds)
            if fault is None or not fault.passing or time.monotonic() + pause > until:
                raise
            logger.warning("%s: %s; again in %.0f s", what, fault.said, pause)
        time.sleep(pause)
        wait = min(2.0 * wait, _LONGEST_WAIT_S)


def asked_again(what: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Decorate a function that reads from the store, or may write twice, so that `patiently` calls it."""

    def patient(function: Callable[..., Result]) -> Callable[..., Result]:
        @wraps(function)
        def asking(*args: Any, **kwargs: Any) -> Result:
            return patiently(partial(function, *args, **kwargs), what=what)

        return asking

    return patient


@contextmanager
def tracking_errors(about: str | None = None) -> Iterator[None]:
    """Turn errors of MLflow, a server, a database or the file system into errors of ours; let others through."""
    try:
        yield
    except Exception as error:
        fault = understood(error)
        if fault is None:
            raise
        value = f"{about}: {fault.said}" if about else fault.said
        if fault.passing:
            store = f"the registry does not answer for {about}" if about else "the tracking store does not answer"
            value = f"{store} ({fault.said})"
        raise fault.kind(value=value, rule=fault.rule, fix=fault.fix) from error


@contextmanager
def optional(what: str, *, unless_passing: bool = False) -> Iterator[None]:
    """Log an error of the store in an optional step: a user may be allowed to read a model and not to tag it."""
    try:
        yield
    except store_errors() as error:
        fault = understood(error) or Fault(said=first_line(error), passing=False)
        if unless_passing and fault.passing:
            raise
        logger.warning("%s (%s)", what, fault.said)


def store_errors() -> tuple[type[Exception], ...]:
    """Return the classes of the errors of stores and file systems."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, RequestException, SQLAlchemyError, sqlite3.Error, OSError, *_client_errors()


def _client_errors() -> tuple[type[Exception], ...]:
    loaded = [(sys.modules[name], classes) for name, classes in _CLIENTS.items() if name in sys.modules]
    # a module that another thread is importing has no classes yet
    return tuple(getattr(module, one) for module, classes in loaded for one in classes if hasattr(module, one))


def is_missing(error: BaseException) -> bool:
    """Return whether MLflow says that something does not exist."""
    return getattr(error, "error_code", None) in _MISSING


def understood(error: BaseException) -> Fault | None:
    """Return the fault behind an error; ``None`` if the error is neither of a store nor of the file system."""
    from requests import Response

    own = isinstance(error, ImportError) and (error.name or "").startswith("amici_eval")
    if own or isinstance(error, AmiciEvalError):
        return None
    if getattr(error, "error_code", None) == "RESOURCE_ALREADY_EXISTS":
        # MLflow's own message names what collided in its database
        return _of_code(error)
    seen = list(_evidence(error))
    answer = next((one for one in seen if isinstance(one, Response)), None)
    if isinstance(error, (*store_errors(), ImportError)):
        # the answer of a server or a database goes before MLflow's code; INTERNAL_ERROR stands for errors without one
        for fault in (*map(_of_transport, reversed(seen)), *map(_of_code, seen)):
            if fault is not None:
                return fault
        if answer is None:
            return _refused(_text(error), "refused", InvalidSpecError)
    # another error with an answer at hand: MLflow could not read that answer
    return None if answer is None else _of_answer(answer)


def _evidence(error: BaseException, seen: set[int] | None = None) -> Iterator[Any]:
    """Yield an error, the last HTTP answer among the local variables of its traceback, and the same of its cause."""
    from requests import Response

    seen = set() if seen is None else seen
    if id(error) in seen:
        return
    seen.add(id(error))
    yield error
    answer, traceback = None, error.__traceback__
    while traceback is not None:
        for value in list(traceback.tb_frame.f_locals.values()):
            if isinstance(value, Response):
                answer = value
            elif isinstance(value, dict) and value and all(isinstance(one, Exception) for one in value.values()):
                # errors of several files, each of which a thread transferred
                for one in value.values():
                    yield from _evidence(one, seen)
        traceback = traceback.tb_next
    if answer is not None:
        yield answer
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        yield from _evidence(cause, seen)


def _of_transport(one: Any) -> Fault | None:
    """Return the fault of a server's answer, of an error on the way to it, or of an error of a database."""
    import requests
    from mlflow.exceptions import MlflowException, RestException
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(one, requests.HTTPError) and one.response is not None:
        one = one.response
    if isinstance(one, requests.Response):
        return _of_answer(one) if one.status_code >= 400 else None
    if isinstance(one, requests.RequestException):
        if isinstance(one, (requests.exceptions.InvalidJSONError, requests.TooManyRedirects)):
            return _refused(_text(one), "no MLflow")
        if isinstance(one, requests.exceptions.SSLError):
            return _refused(_text(one), "certificate")
        return _refused(_text(one), "no address") if isinstance(one, ValueError) else Fault(said=first_line(one))
    if isinstance(one, (SQLAlchemyError, sqlite3.Error)):
        return _of_database(one)
    if isinstance(one, _client_errors()):
        return _of_client(one)
    if isinstance(one, MlflowException) and (fault := _of_collision(one)) is not None:
        return fault
    # an MLflow server sends this code with status 500
    own = isinstance(one, RestException) and one.json.get("error_code") == "INTERNAL_ERROR"
    return Fault(said=first_line(one)) if own else None


def _of_answer(answer: Any) -> Fault:
    """Return the fault of an answer that a command cannot go on with."""
    status = answer.status_code
    try:
        content = answer.json()
    except (ValueError, RuntimeError):
        content = None
    content = content if isinstance(content, dict) else {}
    asked = answer.request
    said = f"{asked.method} {urlparse(asked.url).path} was answered with {status} {answer.reason or ''}".rstrip()
    if message := content.get("message"):
        said += f": {str(message)[:_LONGEST_MESSAGE]}"
    if _passes(status):
        return Fault(said=said)
    if content.get("error_code") in _MISSING:
        return _refused(said, "missing", ModelNotFoundError)
    if status < 400:
        moved = f" after a redirection to {answer.url}" if answer.history else ""
        return _refused(f"{said}{moved}, which is no answer of MLflow", "no MLflow")
    why = f"HTTP {status}"
    return _refused(said, why) if why in _RULES else _refused(said, "refused", InvalidSpecError)


def _of_client(error: Any) -> Fault:
    """Return the fault of an object-store client's error, by the answer that it got, or of MLflow's migrations."""
    if type(error).__module__.startswith("alembic."):
        return _refused(f"the tracking store: {_text(error)}", "database")
    answer = getattr(error, "response", None)
    status = next((getattr(error, one) for one in ("status_code", "status", "code") if hasattr(error, one)), None)
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif answer is not None:
        status = getattr(answer, "status_code", status)
    if isinstance(status, int) and status >= 400:
        passing = _passes(status)
    else:
        kind = type(error).__name__
        passing = _LOST.search(kind) is not None and _UNSAFE.search(kind) is None
    return Fault(said=first_line(error)) if passing else _refused(_text(error), "object store")


def _passes(status: int) -> bool:
    return status in (408, 425, 429) or (status >= 500 and status not in (501, 505, 507, 508, 511))


def _of_database(error: Any) -> Fault:
    from sqlalchemy import exc

    origin = getattr(error, "orig", None) or error
    text = _text(origin)
    if (collision := _of_collision(error)) is not None:
        return collision
    if isinstance(origin, sqlite3.Error):
        passing = "locked" in text or "busy" in text
    elif isinstance(error, (exc.OperationalError, exc.InterfaceError, exc.InternalError)):
        state = getattr(origin, "pgcode", None) or getattr(origin, "sqlstate", None)
        number = origin.args[0] if origin.args else None
        if state:
            passing = state.startswith(_PASSING_SQLSTATE) and state != "53100"
        elif isinstance(number, int):
            passing = number in _PASSING_MYSQL
        else:
            passing = not any(word in text for word in _NO_LOGIN)
    else:
        passing = isinstance(error, (exc.TimeoutError, exc.DisconnectionError))
    if passing or getattr(error, "connection_invalidated", False):
        return Fault(said=text)
    why = next((number for words, number in _SQLITE.items() if words in text), "database")
    return _refused(f"the tracking store: {text}", why)


def _of_collision(error: BaseException) -> Fault | None:
    """Return the fault of a row that exists already, by the messages of SQLite, PostgreSQL, SQL Server or MySQL."""
    text = str(error)
    if not any(words in text for words in ("UNIQUE constraint failed", "duplicate key", "Duplicate entry")):
        return None
    found = _TABLE.search(text)
    table = next(filter(None, found.groups()), "") if found else ""
    # runs share rows of data sets, so trying again finds the row of the other run; all other rows are this run's own
    shared = table.startswith(("dataset", "input"))
    return Fault(said=first_line(error)) if shared else _refused(_text(error), "collision")


def _of_code(one: Any) -> Fault | None:
    """Return the fault of an error to which MLflow gave a specific code, or the system a number."""
    from mlflow.exceptions import MlflowException

    if isinstance(one, MlflowException) and one.error_code != "INTERNAL_ERROR":
        why = f"HTTP {one.get_http_status_code()}"
        # 500 is also the status of codes that MLflow does not know
        if one.error_code == "ABORTED" or (_passes(one.get_http_status_code()) and why != "HTTP 500"):
            return Fault(said=first_line(one))
        if one.error_code in _MISSING:
            return _refused(_text(one), "missing", ModelNotFoundError)
        return _refused(_text(one), why) if why in _RULES else _refused(_text(one), "refused", InvalidSpecError)
    if isinstance(one, ImportError):
        fix = f"pip install {one.name or 'it'}"
        return Fault(said=_text(one), rule="this environment lacks a package that it needs", fix=fix, passing=False)
    if isinstance(one, (ConnectionError, TimeoutError)) and not isinstance(one, BrokenPipeError):
        return Fault(said=first_line(one))
    if isinstance(one, OSError):
        said = f"{one.filename}: {one.strerror}" if one.filename is not None else _text(one)
        return _refused(said, one.errno if one.errno in _RULES else "file", OutputError)
    return None


def _text(error: BaseException) -> str:
    """Return all that an error says, in one line."""
    return " ".join(str(error).split())[:_LONGEST_MESSAGE].rstrip(".") or type(error).__name__


def all_pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Yield the results of one of MLflow's searches, page after page."""
    page = search()
    while page.token:
        yield from page
        page = search(page_token=page.token)
    yield from page


def version_numbers(client: Any, name: str) -> list[int]:
    """Return the numbers of a registered model's versions, oldest first."""
    return sorted(int(one.version) for one in all_pages(partial(client.search_model_versions, f"name='{name}'")))


def runs_anywhere(client: Any, condition: str, *, seconds: float = math.inf) -> Iterator[Any]:
    """Yield runs that match, newest first: those of the current experiment, then of all others, for some seconds."""
    until = time.monotonic() + seconds

    def search(experiments: list[str]) -> Iterator[Any]:
        newest = ["attributes.start_time DESC"]
        return all_pages(partial(client.search_runs, experiments, condition, order_by=newest))

    own = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if own:
        yield from search([own])
    ids = [one.experiment_id for one in all_pages(client.search_experiments) if one.experiment_id != own]
    for start in range(0, len(ids), _EXPERIMENTS_AT_A_TIME):
        if time.monotonic() > until:
            return
        yield from search(ids[start : start + _EXPERIMENTS_AT_A_TIME])


def log_batches(client: Any, run_id: str, **entities: Sequence[Any]) -> None:
    """Log ``params``, ``tags`` or ``metrics`` to a run in requests of a size that servers take, and wait for each."""
    for kind, values in entities.items():
        for start in range(0, len(values), _PER_BATCH[kind]):
            client.log_batch(run_id, **{kind: values[start : start + _PER_BATCH[kind]]}, synchronous=True)
