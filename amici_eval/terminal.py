"""What a user at a terminal, or a CI server, sees of a command, and how it is interrupted."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Reporter", "TerminatedError", "append_for_ci", "catch_signals", "forget_signals", "pause"]

logger = logging.getLogger(__name__)

_LOG_SECONDS = 10.0


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


_interrupts: list[type[KeyboardInterrupt]] = []
"""Signals that came. Python drops what a handler raises while garbage is collected (JAX runs code there), so that long
work asks again."""


def _on_signal(signum: int, frame: object) -> None:  # noqa: ARG001, RUF100 - the signal module's signature
    _interrupts.append(KeyboardInterrupt if signum == signal.SIGINT else TerminatedError)
    raise _interrupts[-1]


def catch_signals() -> None:
    """Let signals interrupt the work as Ctrl-C does."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # a closed terminal must not leave a run RUNNING either
        number = getattr(signal, name, None)
        # a job in the background of a shell ignores Ctrl-C, and so it stays
        if number is not None and (name != "SIGINT" or signal.getsignal(number) is not signal.SIG_IGN):
            signal.signal(number, _on_signal)


def forget_signals() -> None:
    """Forget signals that came to an earlier command of this process."""
    _interrupts.clear()


def pause(seconds: float) -> None:
    """Wait; an interrupt ends it."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if _interrupts:
            raise _interrupts[-1]
        time.sleep(min(left, 1.0))


def append_for_ci(variable: str, text: str) -> None:
    """Append text to the file that an environment variable names, as GitHub's runners want it.

    Parameters
    ----------
    variable
        ``GITHUB_OUTPUT`` or ``GITHUB_STEP_SUMMARY``. Where it is not set, or empty, nothing is written.
    text
        What to append.

    Notes
    -----
    What was done is in the store by then: a file that cannot be written is a warning.
    """
    path = os.environ.get(variable)
    if not path:
        return
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        logger.warning("nothing could be appended to the file of %s: %s", variable, error)


class Reporter:
    """Progress: a bar with rate and time left in a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        # time counts from the first report, so that loading is not taken for work
        self._first_done: int | None = None
        self._started = self._last = 0.0

    def __enter__(self) -> Callable[[int, int, str], None]:
        return self._report

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _report(self, done: int, total: int, what: str) -> None:
        if _interrupts:
            raise _interrupts[-1]
        if sys.stderr.isatty():
            self._show_bar(done, total, what)
            return
        now = time.monotonic()
        if self._first_done is None:
            self._first_done, self._started, self._last = done, now, now
        elif now - self._last >= _LOG_SECONDS and done > self._first_done:
            self._last = now
            left = (now - self._started) / (done - self._first_done) * (total - done)
            sys.stderr.write(f"{100 * done // total:3d} % ({what}), about {left:.0f} s left\n")
            sys.stderr.flush()

    def _show_bar(self, done: int, total: int, what: str) -> None:
        from tqdm import tqdm

        if self._bar is None or self._bar.total != total:
            if self._bar is not None:
                self._bar.close()
            self._bar = tqdm(total=total, unit_scale=True, unit="step", file=sys.stderr, dynamic_ncols=True)
        self._bar.set_description(what, refresh=False)
        self._bar.update(done - self._bar.n)
