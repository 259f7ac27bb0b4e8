"""The free test of one cell type's heads: counted permutations, stopped early, or exact moments without any."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.permutation.exact_moments import DRAWN_FOR_FEW, FEW_CELLS, permutation_moments
from amici_eval.stats.permutation.factor_nulls import factor_draw, factor_exceedances
from amici_eval.stats.permutation.nulls import PermutationCounts
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.permutation.sequential import sequential_exceedances
from amici_eval.stats.permutation.tails import MAX_EXCEEDANCES, tail_p_values
from amici_eval.stats.pvalues import p_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Float64, Int64

    from amici_eval.settings.permutation import PermutationSpec
    from amici_eval.stats.permutation.factor_draws import FactorDraw, FactorStatistics

__all__ = ["FreeTest", "counted", "free_test"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FreeTest:
    """What the free test of one cell type found.

    Parameters
    ----------
    p, p_low, p_high
        p-values and their Monte Carlo intervals, shape (heads,); NaN where there is no test.
    exceedances
        Shape (heads,); -1 where nothing was counted.
    n_permutations
        Drawn permutations; 0 if p follows from moments.
    method
        ``independent`` or ``cyclic`` permutations, ``sequential``, ``moments``, or ``gpd`` where a tail was fitted.
    standardised, permuted
        The statistic of the truth, shape (heads,), and of every permutation, shape (permutations, heads), standardised
        by its exact moments; only where maxT needs them.
    """

    p: Float64[np.ndarray, " heads"]
    p_low: Float64[np.ndarray, " heads"]
    p_high: Float64[np.ndarray, " heads"]
    exceedances: Int64[np.ndarray, " heads"]
    n_permutations: int
    method: str
    standardised: Float64[np.ndarray, " heads"] | None = None
    permuted: Float64[np.ndarray, "permutations heads"] | None = None


def free_test(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    *,
    test: PermutationSpec,
    sampling: str,
    cell_type: str,
    n_permutations: int,
    dead: Bool[np.ndarray, " heads"],
    device: str,
    n_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> FreeTest:
    """Test each head against permutations of all cells of the type.

    Null: the cells are exchangeable. In spatially autocorrelated tissue they are not, and the test is anticonservative.
    """
    n_cells, _, n_heads = factors.shape
    stream = PermutationStream(seed=test.seed, cell_type=cell_type, n_cells=n_cells)
    if test.method == "moments" and n_cells < FEW_CELLS:
        counts = factor_exceedances(
            factors, images, stream=stream, n_permutations=DRAWN_FOR_FEW, dead=dead, device=device, n_threads=n_threads
        )
        return counted(counts, test, "independent")
    if test.method == "moments":
        found = permutation_moments(factors, images, device=device)
        p = np.where(dead, np.nan, found.p_values())
        if progress is not None:
            progress(n_heads * n_permutations)
        return FreeTest(p=p, p_low=p, p_high=p, exceedances=np.full(n_heads, -1), n_permutations=0, method="moments")
    if test.method == "monte_carlo" and test.tail == "none" and test.adjustment != "maxt":
        counts = factor_exceedances(
            factors,
            images,
            stream=stream,
            n_permutations=n_permutations,
            sampling=sampling,
            dead=dead,
            device=device,
            n_threads=n_threads,
            progress=progress,
        )
        return counted(counts, test, sampling)
    draw = factor_draw(factors, images, stream=stream, dead=dead, device=device, n_threads=n_threads)
    if test.method == "sequential":
        return _sequential(draw, test, n_permutations, progress)
    statistics = draw(0, n_permutations)
    if progress is not None:
        progress(n_heads * n_permutations)
    return _in_full(statistics, factors, images, test, n_permutations, device)


def counted(counts: PermutationCounts, test: PermutationSpec, sampling: str) -> FreeTest:
    """Return the test that counts of exceedances make."""
    exceedances = np.where(counts.dead, -1, counts.exceedances)
    raw = p_values(np.maximum(exceedances, 0), n_permutations=max(counts.n_permutations, 1), convention=test.convention)
    raw = raw.without(counts.dead)
    return FreeTest(
        p=raw.p,
        p_low=raw.ci_low,
        p_high=raw.ci_high,
        exceedances=exceedances,
        n_permutations=counts.n_permutations,
        method=sampling,
    )


def _sequential(
    draw: FactorDraw,
    test: PermutationSpec,
    n_permutations: int,
    progress: Callable[[int], None] | None,
) -> FreeTest:
    # fewer permutations than stop_at cannot reach it: all of them are drawn
    stop_at = min(test.stop_at, n_permutations)
    finished = 0

    def drawn(start: int, stop: int) -> FactorStatistics:
        nonlocal finished
        finished = stop
        return draw(start, stop)

    found = sequential_exceedances(drawn, max_permutations=n_permutations, stop_at=stop_at, progress=progress)
    return FreeTest(
        p=found.p,
        p_low=found.ci_low,
        p_high=found.ci_high,
        exceedances=np.where(np.isnan(found.p), -1, found.exceedances),
        n_permutations=finished,
        method="sequential",
    )


def _in_full(
    statistics: FactorStatistics,
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    test: PermutationSpec,
    n_permutations: int,
    device: str,
) -> FreeTest:
    """Keep every permutation's statistic: for tails and for maxT."""
    dead = statistics.dead
    exceedances = np.count_nonzero(statistics.reached, axis=0).astype(np.int64)
    counts = PermutationCounts(exceedances=exceedances, dead=dead, n_permutations=n_permutations)
    made = counted(counts, test, "independent")
    if test.tail == "gpd":
        fits = {
            head: tail_p_values(float(statistics.observed[head]), statistics.statistics[:, head])
            for head in np.flatnonzero(~dead & (exceedances < MAX_EXCEEDANCES))
        }
        fitted = {head: fit.p for head, fit in fits.items() if fit.fits}
        if fitted:
            p = made.p.copy()
            p[list(fitted)] = list(fitted.values())
            made = replace(made, p=p, method="gpd")
    if test.adjustment != "maxt":
        return made
    exact = permutation_moments(factors, images, device=device)
    with np.errstate(divide="ignore", invalid="ignore"):
        deviation = np.sqrt(exact.variance)
        standardised = np.where(dead, np.nan, statistics.observed / deviation)
        permuted = np.where(dead, np.nan, statistics.statistics / deviation)
    return replace(made, standardised=standardised, permuted=permuted)
