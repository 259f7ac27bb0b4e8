"""Waiting for a tracking store that is away for a moment."""

from __future__ import annotations

import logging
import random
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from amici_eval.durable import is_disk_full
from amici_eval.errors import AmiciEvalError, TrackingError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["is_passing", "patiently", "tracking_errors"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 20.0
_PASSING_STATUS = {408, 425, 429}
_PASSING_CODES = {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "INTERNAL_ERROR"}
# two writers made the same row, say of one data set, at once: the other one's is found next time. In the words of
# SQLite, of PostgreSQL and SQL Server, and of MySQL
_COLLISION = ("UNIQUE constraint failed", "duplicate key", "Duplicate entry")
_COLLISION_CODES = {"BAD_REQUEST", "INTERNAL_ERROR"}
_NO_ROOM = ("database or disk is full", "readonly database", "read-only")


def patiently(action: Callable[[], Result], *, seconds: float, what: str) -> Result:
    """Do something again until it succeeds, fails for good, or the time is over.

    Parameters
    ----------
    action
        May be done again after it failed half way.
    seconds
        How long to go on; waits grow from one second to twenty.
    what
        What is done, for the log.

    Raises
    ------
    Exception
        The last one.
    """
    until, wait = time.monotonic() + seconds, _FIRST_WAIT_S
    while True:
        try:
            return action()
        except Exception as error:
            # spread out: many jobs lose the same server at the same time
            pause = wait * random.uniform(0.7, 1.3)  # noqa: S311, RUF100 - no secret
            if not is_passing(error) or time.monotonic() + pause > until:
                raise
            logger.warning("%s: %s; again in %.0f s", what, first_line(error), pause)
        time.sleep(pause)
        wait = min(2.0 * wait, _LONGEST_WAIT_S)


@contextmanager
def tracking_errors() -> Iterator[None]:
    """Say in our words that the store failed, whichever of MLflow's calls it was.

    Raises
    ------
    TrackingError
        For an error that may be gone in a moment; others go through as they are.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, AmiciEvalError) or "mlflow" not in sys.modules or not is_passing(error):
            raise
        raise TrackingError(
            value=f"the tracking store failed ({first_line(error)})",
            rule="it must answer until the command is through",
            fix="run the same command again when it is back: what is finished is taken up",
        ) from error


def is_passing(error: BaseException) -> bool:
    """Return whether an error of a store may be gone in a moment: no connection, too slow, overloaded, a collision."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError, RequestException

    if is_disk_full(error) or any(words in str(error) for words in _NO_ROOM):
        return False
    if isinstance(error, MlflowException):
        if error.error_code in _COLLISION_CODES and any(words in str(error) for words in _COLLISION):
            return True
        status = error.get_http_status_code()
        return error.error_code in _PASSING_CODES or status in _PASSING_STATUS or status > 500
    if isinstance(error, HTTPError) and error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code in _PASSING_STATUS
    return isinstance(error, (RequestException, ConnectionError, TimeoutError))
