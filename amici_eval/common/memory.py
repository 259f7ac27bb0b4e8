"""Measure free memory, and work in chunks that are halved when memory runs out, down to a floor."""

from __future__ import annotations

import errno
import gc
import logging
import math
import os
import threading
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from amici_eval.common.errors import DeviceMemoryError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# assumed to be free if the system does not tell
_UNKNOWN_BYTES = 2**31
_OWN_GROUPS = Path("/proc/self/cgroup")
# name of the controller, folder, limit, use, and the part of the use that the system gives back when asked; second
# line: older kernels
_CONTAINERS = (
    ("", Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    ("memory", Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory() -> int:
    """Return how many bytes this process may still take, as far as the system tells.

    The least of what is left of the machine, of each control group around the process and of ``ulimit -v``, measured
    anew at each call. Half of the machine's memory if the system does not tell what is left, 2 GiB if it tells nothing.
    """
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    if not found:
        try:
            half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (AttributeError, OSError, ValueError):
            half = 0
        found.append(half if half > 0 else _UNKNOWN_BYTES)
    # a container may be allowed less than its machine has
    for controller, root, limit, used, cached in _CONTAINERS:
        for folder in _own_groups(controller, root):
            try:
                spent = int((folder / used).read_text())
                spent -= sum(
                    int(line.split()[1])
                    for line in (folder / "memory.stat").read_text().splitlines()
                    if line.startswith(f"{cached} ")
                )
                found.append(max(0, int((folder / limit).read_text()) - spent))
            except (OSError, ValueError, IndexError):
                continue
    found += _own_limit()
    return min(found)


def _own_groups(controller: str, root: Path) -> list[Path]:
    """Return the folders of the control groups that hold this process, from its own up to the root."""
    try:
        entries = [line.split(":", 2) for line in _OWN_GROUPS.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return [root]
    for entry in entries:
        if len(entry) == 3 and controller in entry[1].split(","):
            own = PurePosixPath(entry[2].lstrip("/"))
            # skip a group outside of what a container sees
            if ".." not in own.parts:
                return [root / group for group in (own, *own.parents)] if own.parts else [root]
    return [root]


def free_bytes(device: str) -> int | None:
    """Return the bytes that are free on a torch device, or ``None`` where it does not tell."""
    import torch

    kind = torch.device(device).type
    if kind == "cpu":
        return available_memory()
    if kind != "cuda":
        return None
    try:
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    except (AssertionError, RuntimeError):  # no driver, or one that an earlier error has left unusable
        return None


def _own_limit() -> list[int]:
    """Return what a limit on the addresses of this process leaves, if there is one."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return []
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        return [max(0, limit - pages * resource.getpagesize())]
    except (ImportError, AttributeError, OSError, ValueError, IndexError):  # no such limits on Windows
        return []


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_PHRASES = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "_ALLOC_FAILED")
"""Phrases of torch, its allocators, cuBLAS and cuFFT in errors without a class of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there was too little memory, on a device or in the machine."""
    # torch's own class is compared by name, so that torch need not be imported for this
    named = type(error).__module__.partition(".")[0] == "torch" and type(error).__name__ == "OutOfMemoryError"
    if named or isinstance(error, (MemoryError, DeviceMemoryError)):
        return True
    if isinstance(error, RuntimeError):
        text = str(error)
        return any(phrase in text or phrase in text.lower() for phrase in _PHRASES)
    # a thread that the system has no memory for is an OSError in some places
    return isinstance(error, OSError) and error.errno == errno.ENOMEM


def release(device: str) -> None:
    """Free the memory of a device that failed work still takes."""
    # what just failed is young, and a search through all objects takes long in a large process
    gc.collect(1)
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


class Shrinking:
    """The size of chunks of work, which is halved for good when memory runs out; thread-safe.

    ``what`` ("attention") and ``unit`` ("cells") are for messages.
    """

    def __init__(self, size: int, *, floor: int = 1, what: str, unit: str = "cells", device: str) -> None:
        self.floor = max(1, floor)
        self.size = max(self.floor, size)
        self._what, self._unit, self._device = what, unit, device
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # locks cannot be pickled: workers that get a model make their own
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def run(self, work: Callable[[int], Result]) -> Result:
        """Return ``work(size)``, tried again with half the size each time memory runs out.

        ``work`` is called again after a failure, so what it had done must not count: it returns what it found, or
        writes to the same places as before.
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
    """Return the result, or ``None`` if there is too little memory; what failed has been freed by then."""
    try:
        return compute()
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
    release(device)
    return None


@contextmanager
def memory_errors_explained(what: str, device: str) -> Iterator[None]:
    """Raise ``DeviceMemoryError`` in place of what NumPy, torch or the interpreter raises when memory runs out."""
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
