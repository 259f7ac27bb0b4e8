"""Permutation tests that end as soon as it is clear that a head shows nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.pvalues import sequential_p_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Bool, Float64, Int64

    from amici_eval.stats.permutation.factor_draws import FactorStatistics

__all__ = ["SequentialTest", "sequential_exceedances"]

_LARGEST_BATCH = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class SequentialTest:
    """p-values of tests of which each ended at its own number of permutations.

    Parameters
    ----------
    exceedances
        Permutations that fit at least as well as the truth until the test ended, shape (heads,).
    n_permutations
        Number of permutations until then, shape (heads,); 0 where dead.
    p
        h/l where the test stopped, (b+1)/(m+1) where it went on to the end, NaN where dead; shape (heads,).
    ci_low, ci_high
        95 % interval of the p-value that permutations without end would give (see ``sequential_p_values``).
    stopped
        Whether the test ended at its h-th exceedance, shape (heads,).
    dead
        Heads that have no test, shape (heads,).
    """

    exceedances: Int64[np.ndarray, " heads"]
    n_permutations: Int64[np.ndarray, " heads"]
    p: Float64[np.ndarray, " heads"]
    ci_low: Float64[np.ndarray, " heads"]
    ci_high: Float64[np.ndarray, " heads"]
    stopped: Bool[np.ndarray, " heads"]
    dead: Bool[np.ndarray, " heads"]


def sequential_exceedances(
    draw: Callable[[int, int], FactorStatistics],
    *,
    max_permutations: int,
    stop_at: int = 20,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> SequentialTest:
    """Test heads until each has fitted by chance ``stop_at`` times, or for ``max_permutations``.

    A head that shows nothing has a p-value near 1/2 and ends after some 2 ``stop_at`` permutations; only heads that fit
    better than chance need them all. The null is that of ``draw``.

    Parameters
    ----------
    draw
        Gives the statistics of permutations ``start`` to ``stop - 1``: ``factor_draw`` or ``stratified_draw``.
    max_permutations
        Number m of permutations after which every test ends; the smallest p-value is 1/(m+1).
    stop_at
        Number h of exceedances at which a test ends; a p-value that stopped is off by about p/sqrt(h).
    batch
        Permutations that are drawn first; each further batch is twice as large, up to 4,096. No effect on the result.
    progress
        Called with the number of (head, permutation) pairs finished since the last call; their sum is heads x
        ``max_permutations``, also if all tests ended before.

    Raises
    ------
    ValueError
        If a setting is out of range.

    Notes
    -----
    A test ends with the permutation that brings its h-th exceedance, whatever was drawn with it. ``p <= a`` has a
    probability of at most a under the null (Besag & Clifford 1991).
    """
    if not 1 <= stop_at <= max_permutations:
        msg = f"stop_at is {stop_at}; it must lie in [1, max_permutations={max_permutations}]"
        raise ValueError(msg)
    if batch < 1:
        msg = f"batch is {batch}; at least 1 permutation is drawn at once"
        raise ValueError(msg)
    for start, stop in _ranges(batch, max_permutations):
        drawn = draw(start, stop)
        if start == 0:
            dead = drawn.dead
            exceedances = np.zeros(dead.size, dtype=np.int64)
            n_permutations = np.where(dead, 0, max_permutations).astype(np.int64)
            goes_on = ~dead
        so_far = exceedances + np.cumsum(drawn.reached, axis=0)
        ends = goes_on & (so_far[-1] >= stop_at)
        n_permutations[ends] = start + 1 + np.argmax(so_far[:, ends] >= stop_at, axis=0)
        exceedances[goes_on] = np.minimum(so_far[-1, goes_on], stop_at)
        goes_on &= ~ends
        if progress is not None:
            progress(dead.size * (stop - start))
        if not goes_on.any():
            break
    if progress is not None and stop < max_permutations:
        progress(dead.size * (max_permutations - stop))
    found = sequential_p_values(
        exceedances,
        n_permutations=np.where(dead, max_permutations, n_permutations),
        max_permutations=max_permutations,
        stop_at=stop_at,
    )
    return SequentialTest(
        exceedances=exceedances,
        n_permutations=n_permutations,
        p=np.where(dead, np.nan, found.p),
        ci_low=np.where(dead, np.nan, found.ci_low),
        ci_high=np.where(dead, np.nan, found.ci_high),
        stopped=~dead & ~goes_on,
        dead=dead,
    )


def _ranges(batch: int, stop: int) -> Iterator[tuple[int, int]]:
    first = 0
    while first < stop:
        yield first, min(first + batch, stop)
        first, batch = first + batch, max(batch, min(2 * batch, _LARGEST_BATCH))
