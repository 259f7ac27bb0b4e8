"""Faults as they are injected into a process, or from outside into what it depends on."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import requests

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["KINDS", "Kind", "Surroundings"]


@dataclass(frozen=True)
class Surroundings:
    """What faults act on: the local folder, the proxy before the server, and how long a command takes undisturbed."""

    output: Path
    proxy: str
    seconds: float
    writes: int
    requests: int
    parts: int


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of fault.

    Parameters
    ----------
    name
        For the report.
    remote
        Whether runs go to a server behind the proxy, else into SQLite.
    inside
        Injects the fault into the process of the command, before it begins.
    outside
        Acts on it from outside, given its process id, while it works.
    before, after
        What happens to the surroundings before it begins and when it has ended.
    survives
        Whether the command itself must succeed in spite of the fault.
    retry_s
        How long the command asks a store again.
    at_once
        How many commands work at a time.
    exact
        Whether numbers must be the same bit for bit; else by rounding: sums of smaller pieces.
    """

    name: str
    remote: bool = False
    inside: Callable[[Surroundings, random.Random], None] | None = None
    outside: Callable[[int, Surroundings, random.Random], None] | None = None
    before: Callable[[Surroundings, random.Random], None] | None = None
    after: Callable[[Surroundings, random.Random], None] | None = None
    survives: bool = False
    retry_s: float = 0.0
    at_once: int = 1
    exact: bool = True


def _at_a_time(number: int) -> Callable[[int, Surroundings, random.Random], None]:
    def send(pid: int, around: Surroundings, rng: random.Random) -> None:
        time.sleep(rng.uniform(0.0, 0.9 * around.seconds))
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    return send


def _at_a_part(number: int) -> Callable[[Surroundings, random.Random], None]:
    """Interrupt the process just before or just after it keeps one of the parts."""

    def inject(around: Surroundings, rng: random.Random) -> None:
        from amici_eval.evaluation.all_types import FinishedParts

        put, left, early = FinishedParts.put, rng.randrange(around.parts), rng.random() < 0.5

        def interrupting(self: Any, name: str, value: object) -> None:
            nonlocal left
            left -= 1
            if left < 0 and early:
                os.kill(os.getpid(), number)
            put(self, name, value)
            if left < 0:
                os.kill(os.getpid(), number)

        FinishedParts.put = interrupting  # type: ignore[method-assign]

    return inject


def set_mode(around: Surroundings, mode: str, *, after: int = 0, seconds: float = 0.0) -> None:
    requests.get(
        f"{around.proxy}/__mode", params={"mode": mode, "after": after, "seconds": seconds}, timeout=10
    ).raise_for_status()


def _proxy(mode: str, *, seconds: float = 0.0) -> Callable[[Surroundings, random.Random], None]:
    def act(around: Surroundings, rng: random.Random) -> None:
        set_mode(around, mode, after=rng.randrange(around.requests), seconds=seconds)

    return act


def _proxy_ok(around: Surroundings, rng: random.Random) -> None:
    del rng
    set_mode(around, "ok")


def _disk_full(around: Surroundings, rng: random.Random) -> None:
    """From the n-th file on that is opened for writing below the local folder there is no room."""
    left, below = rng.randrange(around.writes), str(around.output)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event != "open" or not isinstance(arguments[0], (str, os.PathLike)):
            return
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not str(arguments[0]).startswith(below):
            return
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    sys.addaudithook(hook)


def _clock_jumps(around: Surroundings, rng: random.Random) -> None:
    real, started, jump = time.time, time.monotonic(), rng.choice([-1, 1]) * rng.uniform(600.0, 86400.0)
    at = rng.uniform(0.0, around.seconds)
    time.time = lambda: real() + (jump if time.monotonic() - started > at else 0.0)


def _no_home(around: Surroundings, rng: random.Random) -> None:
    del around, rng
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "MPLCONFIGDIR"):
        os.environ[name] = "/proc/nowhere"


def _device_full(around: Surroundings, rng: random.Random) -> None:
    """Some pieces of the work find the memory of the device full, until they are small enough."""
    del around
    import torch

    from amici_eval.common.memory import Shrinking

    run = Shrinking.run

    def scarce(self: Shrinking, work: Callable[[int], Any]) -> Any:
        def fails(size: int) -> Any:
            if size > self.floor and rng.random() < 0.3:
                message = "CUDA out of memory. Tried to allocate 2.00 GiB (injected)"
                raise torch.OutOfMemoryError(message)
            return work(size)

        return run(self, fails)

    Shrinking.run = scarce  # type: ignore[method-assign]


def _damage_parts(around: Surroundings, rng: random.Random) -> None:
    """Cut off, alter or empty some of the files that an interrupted command left."""
    files = [path for path in around.output.rglob("*") if path.is_file() and path.name != "lock"]
    for path in files:
        if rng.random() < 0.5:
            continue
        content = bytearray(path.read_bytes())
        what = rng.choice(["cut", "flip", "empty"])
        if what == "cut":
            content = content[: rng.randrange(len(content) + 1)]
        elif what == "flip" and content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif what == "empty":
            content = bytearray()
        path.write_bytes(content)


def _signals(name: str, number: int) -> tuple[Kind, ...]:
    return (
        Kind(name=f"{name} at any time", outside=_at_a_time(number)),
        Kind(name=f"{name} at any time, server", remote=True, outside=_at_a_time(number)),
        Kind(name=f"{name} between types", inside=_at_a_part(number)),
    )


_KILL = _at_a_part(signal.SIGKILL)


def _clock_jumps_and_kill(around: Surroundings, rng: random.Random) -> None:
    _clock_jumps(around, rng)
    _KILL(around, rng)


KINDS = (
    *_signals("SIGKILL", signal.SIGKILL),
    *_signals("SIGTERM", signal.SIGTERM),
    *_signals("Ctrl-C", signal.SIGINT),
    Kind(name="server gone", remote=True, before=_proxy("gone"), after=_proxy_ok),
    Kind(
        name="server gone for a moment", remote=True, before=_proxy("gone", seconds=1.5), after=_proxy_ok, retry_s=20.0
    ),
    Kind(name="answers of the server lost", remote=True, before=_proxy("lost"), after=_proxy_ok),
    Kind(name="slow server", remote=True, before=_proxy("slow"), after=_proxy_ok, survives=True),
    Kind(name="artifact store full", remote=True, before=_proxy("full"), after=_proxy_ok),
    Kind(name="artifact store read-only", remote=True, before=_proxy("read-only"), after=_proxy_ok),
    Kind(name="disk full", inside=_disk_full),
    Kind(name="device memory full", inside=_device_full, survives=True, exact=False),
    # two that log the same data set at the same time are in each other's way in MLflow: one asks again
    Kind(name="two at once", at_once=2, survives=True, retry_s=20.0),
    Kind(name="two at once, one killed", at_once=2, retry_s=20.0, outside=_at_a_time(signal.SIGKILL)),
    Kind(name="damaged local results", inside=_KILL, after=_damage_parts),
    Kind(name="clock jumps, then SIGKILL", inside=_clock_jumps_and_kill),
    Kind(name="read-only home", inside=_no_home, survives=True),
)
