"""Work in chunks that are halved where memory ends, on a device or in the machine, down to a floor."""

from __future__ import annotations

import errno
import gc
import logging
import math
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from amici_eval.common.errors import DeviceMemoryError, first_line
from amici_eval.common.free_memory import free_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Shrinking", "is_out_of_memory", "memory_errors_explained", "release", "unless_memory_ends"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_PHRASES = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "_ALLOC_FAILED")
"""How torch, its allocators, cuBLAS and cuFFT say it in errors without a class of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there was too little memory, on a device or in the machine."""
    # torch's own class is known by its name: rooms that do without torch do not load it for this
    named = type(error).__module__.partition(".")[0] == "torch" and type(error).__name__ == "OutOfMemoryError"
    if named or isinstance(error, (MemoryError, DeviceMemoryError)):
        return True
    if isinstance(error, RuntimeError):
        text = str(error)
        return any(phrase in text or phrase in text.lower() for phrase in _PHRASES)
    # a thread that the system has no memory for is an OSError in some places
    return isinstance(error, OSError) and error.errno == errno.ENOMEM


def release(device: str) -> None:
    """Give back to a device what failed work has left."""
    # what just failed is young; a search through all objects takes long in a large process
    gc.collect(1)
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


class Shrinking:
    """How much is worked on at a time: halved where memory ends, and it stays so.

    Parameters
    ----------
    size
        To begin with.
    floor
        Least size; what does not fit with it, does not fit.
    what
        The work, for messages: "attention".
    unit
        What is counted: "cells".
    device
        Torch device of the work.

    Notes
    -----
    Safe to use from several threads.
    """

    def __init__(self, size: int, *, floor: int = 1, what: str, unit: str = "cells", device: str) -> None:
        self.floor = max(1, floor)
        self.size = max(self.floor, size)
        self._what, self._unit, self._device = what, unit, device
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # a model is sent to workers with what it holds, and each has a lock of its own
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def run(self, work: Callable[[int], Result]) -> Result:
        """Return ``work(size)``, tried with half the size as long as memory ends.

        Parameters
        ----------
        work
            Called again after a failure, so what it has done by then must not count: it returns what it found, or
            writes to the same places as before.

        Raises
        ------
        DeviceMemoryError
            If the floor is too much.
        """
        while True:
            size = self.size
            try:
                return work(size)
            except (MemoryError, RuntimeError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
                if size <= self.floor:
                    raise self._explained(size, error) from error
            # not inside the except clause: there the exception keeps alive what the work had taken
            self._halve(size)

    def _halve(self, tried: int) -> None:
        with self._lock:
            # another thread may have halved it meanwhile
            self.size = min(self.size, max(self.floor, tried // 2))
        logger.warning(
            "out of memory on %s (%s): going on with %d %s at a time", self._device, self._what, self.size, self._unit
        )
        release(self._device)

    def _explained(self, size: int, error: BaseException) -> DeviceMemoryError:
        if isinstance(error, DeviceMemoryError):
            return error
        return _explained(f"{self._what} of {size} {self._unit} at a time", self._device, error)


def unless_memory_ends(compute: Callable[[], Result], *, device: str) -> Result | None:
    """Return ``None`` where there is too little memory; what failed has been freed by then."""
    try:
        return compute()
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
    release(device)
    return None


@contextmanager
def memory_errors_explained(what: str, device: str) -> Iterator[None]:
    """Run a body; where memory ends in it, say so in words of ours.

    Parameters
    ----------
    what
        The work, for the message.
    device
        Torch device of the work.

    Raises
    ------
    DeviceMemoryError
        In place of whatever NumPy, torch or the interpreter raised.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, DeviceMemoryError) or not is_out_of_memory(error):
            raise
        raise _explained(what, device, error) from error


def _explained(what: str, device: str, error: BaseException) -> DeviceMemoryError:
    free = free_bytes(device)
    left = "" if free is None else f"; {_written(free)} are free"
    on_cpu = device.startswith("cpu")
    own = "" if isinstance(error, MemoryError) and not str(error) else f" ({first_line(error)})"
    return DeviceMemoryError(
        value=f"out of memory on {device} at {what}{own}{left}",
        rule="the smallest piece of the work must fit",
        fix="end other programs that take memory, take a machine with more, evaluate fewer cells (data.subset), or set "
        "smaller ablation.memory_budget and ablation.batch_size"
        if on_cpu
        else "set ablation.device=cpu, or smaller ablation.batch_size and ablation.memory_budget, or end what else "
        "runs on the device",
    )


def _written(n_bytes: int) -> str:
    power = min(4, int(math.log(max(1, n_bytes), 1000)))
    return f"{n_bytes / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
