"""What a user at a terminal, or a CI server, sees of a command, and how it is interrupted."""

from __future__ import annotations

import io
import logging
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import OutputError
from amici_eval.common.text import mask_secrets, printable, terminal_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

_LOG_SECONDS = 10.0


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


_interrupts: list[type[KeyboardInterrupt]] = []
"""Signals that came. Python drops what a handler raises while garbage is collected (JAX runs code there), so that long
work asks again."""


def _on_signal(signum: int, frame: object) -> None:  # noqa: ARG001, RUF100 - the signal module's signature
    _interrupts.append(KeyboardInterrupt if signum == signal.SIGINT else TerminatedError)
    name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
    # a kernel that is under way may hold it up for seconds; a stream may be locked by what was interrupted
    with suppress(OSError, ValueError):
        # nobody may read it; and where there was no such stream, the number is that of a file by now
        if sys.__stderr__ is not None and select.select([], [2], [], 0)[1]:
            # in a terminal a bar of progress may stand in the line
            os.write(2, f"{chr(10) if os.isatty(2) else ''}amici-eval: stopping ({name})\n".encode())
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


def check_temporary_folder() -> None:
    """Refuse to work where no temporary file can be written; say so if it will not be where ``TMPDIR`` says."""
    asked = os.environ.get("TMPDIR")
    try:
        taken = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise OutputError(
            value=f"no temporary file can be written ({error.strerror}; TMPDIR={asked or 'not set'})",
            rule="a folder for temporary files is needed, with space left",
            fix="set TMPDIR to a folder that can be written to, or make space in it",
        ) from error
    if asked and Path(asked).absolute() != Path(taken).absolute():
        logger.warning("TMPDIR=%s cannot be written to, or is full: temporary files go to %s", asked, taken)


def quiet_matplotlib() -> None:
    """Leave out that matplotlib found no folder for its cache: it takes a temporary one, and nothing is lost."""
    logging.getLogger("matplotlib").addFilter(_is_not_about_folders)


def _is_not_about_folders(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(
        ("mkdir -p failed for path", "Matplotlib created a temporary cache directory")
    )


def pause(seconds: float) -> None:
    """Wait; an interrupt ends it."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if _interrupts:
            raise _interrupts[-1]
        time.sleep(min(left, 1.0))


def append_for_ci(variable: str, text: str) -> None:
    """Append text to the file that an environment variable names, as GitHub's runners want it.

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


def cleaned(text: str) -> str:
    """Return text for the terminal: names in it are no commands, neither to it nor to a CI server; no credentials."""
    return terminal_text(mask_secrets(text), commands=bool(os.environ.get("GITHUB_ACTIONS")))


class _SafeRecord(logging.LogRecord):
    """A record whose message is safe whoever writes it: MLflow has handlers of its own."""

    def getMessage(self) -> str:  # noqa: N802, RUF100 - logging's name
        if self.name.partition(".")[0] == "amici_eval" and isinstance(self.args, tuple):
            # a name with a line break must not look like a message of its own
            args = tuple(printable(arg) if isinstance(arg, str) else arg for arg in self.args)
            return cleaned(str(self.msg) % args if args else str(self.msg))
        return cleaned(super().getMessage())


def guard_logs() -> None:
    """Mask credentials, and show control characters, in the log messages of all libraries in this process."""

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = _SafeRecord(*args, **kwargs)
        if made.exc_info and made.exc_info[0] is not None:
            # formatters take this text rather than make their own
            made.exc_text = cleaned("".join(traceback.format_exception(*made.exc_info)).rstrip("\n"))
        return made

    logging.setLogRecordFactory(record)


class _MaskedStream(io.TextIOBase):
    """A stream that masks credentials in what is written: tracebacks and warnings come from anywhere."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(mask_secrets(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def writable(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self._stream.encoding)

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return getattr(self._stream, "errors", None)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Mask credentials in all that a body writes to the standard streams, one piece of text at a time."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_MaskedStream(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


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
        what = printable(what)
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
