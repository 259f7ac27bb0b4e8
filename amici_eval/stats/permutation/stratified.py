"""The permutation test of heads within strata: samples, tiles of tissue, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.stats.permutation.factor_nulls import FactorDraw, check_factors, draw_from, part_of
from amici_eval.stats.permutation.nulls import PermutationCounts
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.permutation.statistics import pack

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Bool, Float, Int64

_PERMUTATIONS_AT_ONCE = 1024


def stratified_draw(
    factors: Float[np.ndarray, "cells columns heads"],
    images: Float[np.ndarray, "cells columns heads"],
    *,
    strata: Int64[np.ndarray, " cells"],
    labels: Sequence[str],
    seed: int,
    cell_type: str,
    dead: Bool[np.ndarray, " heads"] | None = None,
    device: str = "cpu",
    n_threads: int | None = None,
) -> FactorDraw:
    """Pack factors once and return a callable for the statistics of any range of permutations within strata.

    Null: rows of a head's prediction are shuffled among the cells of one type in each stratum. Exchangeable if, given
    type and stratum, expression is independent of the neighbourhood and the cells of a stratum are alike: strata lie in
    one sample each and are narrower than the scale at which tissue varies. T adds over strata, each centred by itself,
    so that its mean over permutations is 0. Permutations depend on (seed, cell type, stratum label, number), not on how
    strata are numbered; a head whose factors vary in no stratum is dead.
    """
    n_cells, _, n_heads = factors.shape
    check_factors(factors, images, n_permuted=n_cells, dead=dead, n_threads=n_threads)
    names = [str(label) for label in labels]
    if strata.shape != (n_cells,) or not np.issubdtype(strata.dtype, np.integer):
        msg = f"strata {strata.shape} of {strata.dtype}; one whole number for each of {n_cells} cells is needed"
        raise ValueError(msg)
    if strata.min() < 0 or strata.max() >= len(names):
        msg = f"strata lie in [{strata.min()}, {strata.max()}], but there are {len(names)} labels"
        raise ValueError(msg)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        msg = f"two strata have the label {twice!r}; they would be permuted alike"
        raise ValueError(msg)

    device = "cpu" if torch.device(device).type == "mps" else device
    is_dead = np.zeros(n_heads, dtype=bool) if dead is None else dead.astype(bool)
    is_dead |= ~_finite(factors) | ~_finite(images)
    by_stratum = np.argsort(strata, kind="stable")
    ends = np.cumsum(np.bincount(strata, minlength=len(names)))
    parts = []
    for number in sorted(range(len(names)), key=names.__getitem__):
        cells = by_stratum[ends[number - 1] if number else 0 : ends[number]]
        if cells.size > 1:
            f, z = factors[cells], images[cells]
            stream = PermutationStream(seed=seed, cell_type=cell_type, n_cells=cells.size, stratum=names[number])
            parts.append(part_of(pack(f, z, dead=is_dead), f, z, stream=stream))
    return draw_from(parts, n_heads=n_heads, dead=is_dead, device=device, n_threads=n_threads)


def stratified_exceedances(
    factors: Float[np.ndarray, "cells columns heads"],
    images: Float[np.ndarray, "cells columns heads"],
    *,
    strata: Int64[np.ndarray, " cells"],
    labels: Sequence[str],
    seed: int,
    cell_type: str,
    n_permutations: int,
    dead: Bool[np.ndarray, " heads"] | None = None,
    device: str = "cpu",
    n_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> PermutationCounts:
    """Count the permutations within strata under which a head fits expression at least as well as in truth.

    Null and arguments are those of ``stratified_draw``; ``progress`` gets the number of (head, permutation) pairs
    finished since the last call.
    """
    draw = stratified_draw(
        factors,
        images,
        strata=strata,
        labels=labels,
        seed=seed,
        cell_type=cell_type,
        dead=dead,
        device=device,
        n_threads=n_threads,
    )
    exceedances = np.zeros(draw.dead.size, dtype=np.int64)
    for start in range(0, n_permutations, _PERMUTATIONS_AT_ONCE):
        stop = min(start + _PERMUTATIONS_AT_ONCE, n_permutations)
        exceedances += np.count_nonzero(draw(start, stop).reached, axis=0)
        if progress is not None:
            progress(exceedances.size * (stop - start))
    return PermutationCounts(exceedances=exceedances, dead=draw.dead, n_permutations=n_permutations)


def _finite(values: Float[np.ndarray, "cells columns heads"]) -> Bool[np.ndarray, " heads"]:
    """Return whether the sum of squares of a head's numbers is finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        finite: Bool[np.ndarray, " heads"] = np.isfinite(np.einsum("iah,iah->h", values, values, dtype=np.float64))
    return finite
