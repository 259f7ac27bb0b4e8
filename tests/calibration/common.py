"""What all parts share: options, jobs on several cores, and rates of rejection with their errors."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import kstest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Row = dict[str, Any]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for.

    Parameters
    ----------
    results, docs
        Folders of the tables, and of the page and figures that are generated from them.
    data
        Folder with real tissue (.h5ad); without it, parts that need it are left out.
    seed
        All random numbers are a function of it, of the part and of the simulation's number.
    workers
        Processes; 1 stays in this one. No effect on the results but for rounding.
    quick
        A handful of simulations: to see that everything runs, not to learn anything.
    """

    results: Path = Path("calibration-results")
    docs: Path = Path("docs")
    data: Path | None = None
    seed: int = 0
    workers: int = 2
    quick: bool = False

    def simulations(self, n: int) -> int:
        return 3 if self.quick else n


def spread(function: Callable[..., list[Row]], jobs: Sequence[Row], *, workers: int) -> list[Row]:
    """Return the rows of all jobs, in their order; each job is the keyword arguments of ``function``."""
    if workers == 1:
        return [row for job in jobs for row in function(**job)]
    # threads of two processes would only wait for each other
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
            waiting = [pool.submit(function, **job) for job in jobs]
            return [row for one in waiting for row in one.result()]
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _one_thread() -> None:
    torch.set_num_threads(1)


def rejections(p_by_simulation: Iterable[np.ndarray], *, alpha: float) -> tuple[float, float]:
    """Return the share of p-values up to ``alpha`` and its standard error.

    Heads of one simulation share its expression, so that the error comes from the spread between simulations.
    """
    kept = [p[np.isfinite(p)] for p in p_by_simulation]
    sizes = np.array([len(p) for p in kept], dtype=np.float64)
    if sizes.sum() == 0:
        return float("nan"), float("nan")
    hits = np.array([np.count_nonzero(p <= alpha) for p in kept], dtype=np.float64)
    rate = hits.sum() / sizes.sum()
    off = hits - rate * sizes
    # of a ratio of means; where nothing was rejected, that of one rejection
    error = np.sqrt(np.square(off).sum()) / sizes.sum()
    return float(rate), float(max(error, 1.0 / sizes.sum()))


def summary(p_by_simulation: Sequence[np.ndarray]) -> Row:
    """Return what a table says of the p-values of one null in one setting."""
    p = np.concatenate([np.ravel(one) for one in p_by_simulation])
    defined = p[np.isfinite(p)]
    at_05, se_05 = rejections(map(np.ravel, p_by_simulation), alpha=0.05)
    at_01, se_01 = rejections(map(np.ravel, p_by_simulation), alpha=0.01)
    return {
        "simulations": len(p_by_simulation),
        "tests": defined.size,
        "undefined": p.size - defined.size,
        "at_05": at_05,
        "se_05": se_05,
        "at_01": at_01,
        "se_01": se_01,
        "ks": float(kstest(defined, "uniform").statistic) if defined.size else float("nan"),
    }
