"""What Ray does to the process that starts it, kept within bounds: environment, signals, waiting for an address."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_answers", "environment", "import_ray", "own_handlers"]

_ANSWER_S = 10.0
_ENVIRONMENT = {
    # nothing phones home
    "RAY_USAGE_STATS_ENABLED": "0",
    # workers compute on processors, so Ray may leave alone which accelerators they see
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def import_ray() -> Any:
    """Return the module ``ray``."""
    try:
        import ray
    except ImportError as error:
        raise LaunchError(
            value="launch=ray without the package ray",
            rule="launch=ray needs the extra",
            fix="pip install 'amici-eval[ray]', or leave out launch=ray",
        ) from error
    return ray


def check_answers(address: str) -> None:
    """Raise OSError if nothing listens at an address: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()


@contextmanager
def environment() -> Iterator[None]:
    """Set what Ray reads while it is imported and started; processes that it starts inherit it."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def own_handlers() -> Iterator[None]:
    """Keep our handler of SIGTERM, which Ray replaces by one that exits at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
