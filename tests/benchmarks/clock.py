"""Time, memory and the machine's speed at matrix products."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SLOW_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call cost.

    Parameters
    ----------
    wall_s, cpu_s
        Median over the repeats.
    peak_mb, above_mb
        Highest resident memory of the process during the calls, and that minus what was resident before.
    repeats
        How often it was called.
    """

    wall_s: float
    cpu_s: float
    peak_mb: float
    above_mb: float
    repeats: int
    value: Any

    def row(self) -> dict[str, float]:
        """Return all but the value, for a table."""
        return {name: getattr(self, name) for name in ("wall_s", "cpu_s", "peak_mb", "above_mb", "repeats")}


def cost_of(function: Callable[[], Any], *, repeats: int = 1) -> Cost:
    """Call a function some times (once, if the first call is slow) and return what it cost, and its last value."""
    memory = _Memory()
    wall, cpu, value = [], [], None
    while len(wall) < repeats and (not wall or wall[0] < SLOW_S):
        value = None
        started, busy = time.perf_counter(), time.process_time()
        value = function()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - busy)
    peak = memory.peak_mb()
    return Cost(
        wall_s=statistics.median(wall),
        cpu_s=statistics.median(cpu),
        peak_mb=peak,
        above_mb=peak - memory.before_mb,
        repeats=len(wall),
        value=value,
    )


def process_peak_mb() -> float:
    """Highest resident memory of this process so far, as the system counts it."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class _Memory:
    """Peak resident memory from now on; where the high-water mark cannot be set back, the peak so far."""

    def __init__(self) -> None:
        self.before_mb = _status_mb("VmRSS") or process_peak_mb()
        try:
            # Linux: sets the high-water mark back to what is resident now
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass

    def peak_mb(self) -> float:
        return _status_mb("VmHWM") or process_peak_mb()


def _status_mb(name: str) -> float | None:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
    return None


def product_rate(rows: int, inner: int, columns: int, *, seconds: float = 0.3) -> float:
    """Best float32 rate of ``(rows x inner) @ (inner x columns)`` in floating-point operations a second."""
    import torch

    a, b = torch.rand(rows, inner), torch.rand(inner, columns)
    out = torch.empty(rows, columns)
    best, until = float("inf"), time.perf_counter() + seconds
    torch.mm(a, b, out=out)
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - started)
    return 2.0 * rows * inner * columns / best
