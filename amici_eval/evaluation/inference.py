"""From the results of each type to adjusted p-values, intervals and held-out parts of all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amici_eval.evaluation.tiles import HELD_OUT, IN_SAMPLE, rows_of
from amici_eval.results.analyses import HeldOutParts, Intervals, SpatialTests
from amici_eval.stats.pvalues import adjust_p_values, max_t_p_values
from amici_eval.stats.tile_tests import tile_bootstrap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float64

    from amici_eval.evaluation.one_type import TypeEvaluation
    from amici_eval.settings.evaluation import PermutationSpec
    from amici_eval.stats.explained_variance import TileSums
    from amici_eval.stats.tile_tests import TileBootstrap


def _interval(rows: TileSums, test: PermutationSpec, cell_type: str) -> TileBootstrap:
    return tile_bootstrap(
        rows,
        confidence=test.confidence,
        n_resamples=test.n_bootstrap,
        seed=test.seed,
        cell_type=cell_type,
    )


def intervals(
    types: Sequence[str],
    evaluated: Sequence[TypeEvaluation | None],
    *,
    test: PermutationSpec,
    n_heads: int,
    tile_width: float,
) -> Intervals:
    """Return confidence intervals of explained variance by resampling tiles; see :class:`Intervals`."""
    found = [
        None if item is None or item.moments is None else _interval(rows_of(item.moments), test, cell_type)
        for cell_type, item in zip(types, evaluated, strict=True)
    ]
    nothing = np.full(n_heads + 1, np.nan)
    low = np.stack([nothing if one is None else one.low for one in found], axis=1)
    high = np.stack([nothing if one is None else one.high for one in found], axis=1)
    return Intervals(
        confidence=test.confidence,
        n_resamples=test.n_bootstrap,
        tile_width=tile_width,
        n_tiles=np.array([0 if one is None else one.n_tiles for one in found], dtype=np.int64),
        low=low[:-1],
        high=high[:-1],
        full_low=low[-1],
        full_high=high[-1],
        reasons=tuple(
            (cell_type, one.reason)
            for cell_type, one in zip(types, found, strict=True)
            if one is not None and one.reason is not None
        ),
    )


def held_out_parts(
    types: Sequence[str],
    evaluated: Sequence[TypeEvaluation | None],
    *,
    test: PermutationSpec,
    n_heads: int,
) -> HeldOutParts:
    """Return explained variance in-sample and held out, side by side; see :class:`HeldOutParts`."""
    n_types = len(types)
    n_cells = np.zeros((2, n_types), dtype=np.int64)
    values, low, high = (np.full((2, n_heads + 1, n_types), np.nan) for _ in range(3))
    for index, (cell_type, item) in enumerate(zip(types, evaluated, strict=True)):
        if item is None or item.moments is None:
            continue
        for part in (IN_SAMPLE, HELD_OUT):
            rows = rows_of(item.moments, part)
            n_cells[part, index] = rows.n_cells.sum()
            values[part, :, index] = rows.explained_variance if len(rows.tiles) else np.nan
            if test.n_bootstrap and len(rows.tiles):
                found = _interval(rows, test, cell_type)
                low[part, :, index], high[part, :, index] = found.low, found.high
    return HeldOutParts(
        n_cells=n_cells,
        expl_var=values[:, :-1],
        full=values[:, -1],
        low=low[:, :-1],
        high=high[:, :-1],
    )


def adjusted_free(
    p: Float64[np.ndarray, "heads types"], evaluated: Sequence[TypeEvaluation | None], test: PermutationSpec
) -> Float64[np.ndarray, "heads types"]:
    """Return the free p-values adjusted over all heads and types."""
    if test.adjustment != "maxt":
        return adjust_p_values(p, method=test.adjustment)
    drawn = [None if item is None else item.free for item in evaluated]
    n_permutations = next((len(one.permuted) for one in drawn if one is not None and one.permuted is not None), 0)
    observed = np.full(p.shape, np.nan)
    permuted = np.full((n_permutations, *p.shape), np.nan)
    for index, one in enumerate(drawn):
        if one is not None and one.permuted is not None and one.standardised is not None:
            observed[:, index], permuted[:, :, index] = one.standardised, one.permuted
    return max_t_p_values(observed, permuted)


def spatial_tests(
    types: Sequence[str],
    evaluated: Sequence[TypeEvaluation | None],
    *,
    test: PermutationSpec,
    n_heads: int,
    n_genes: int,
) -> SpatialTests:
    """Return the tests of all types that hold in tissue, adjusted within their families; see :class:`SpatialTests`."""
    found = [None if item is None else item.spatial for item in evaluated]
    n_widths = max((len(one.widths) for one in found if one is not None), default=0)

    def heads(name: str) -> Float64[np.ndarray, "heads types"]:
        return np.stack([np.full(n_heads, np.nan) if one is None else getattr(one, name) for one in found], axis=1)

    def of_type(name: str) -> Float64[np.ndarray, " types"]:
        return np.array([np.nan if one is None else getattr(one, name) for one in found])

    p_gene = np.stack([np.full((n_heads, n_genes), np.nan) if one is None else one.p_gene for one in found], axis=1)
    widths = np.full((n_widths, len(types)), np.nan)
    p_by_width = np.full((n_widths, n_heads, len(types)), np.nan)
    reasons: list[tuple[int, str, str]] = []
    for index, (cell_type, one) in enumerate(zip(types, found, strict=True)):
        if one is None:
            continue
        widths[: len(one.widths), index] = one.widths
        if len(one.widths):
            p_by_width[: len(one.widths), :, index] = one.p_by_width
        reasons += [(head, cell_type, why) for head, why in one.reasons.items()]
    # maxT needs permutations shared by all types; Holm controls the same error under any dependence
    method = "holm" if test.adjustment == "maxt" else test.adjustment
    p = heads("p")
    return SpatialTests(
        null=test.spatial_null,
        method=tuple("" if one is None else one.method for one in found),
        p_value=p,
        p_value_adj=adjust_p_values(p, method=method),
        p_ci_low=heads("p_low"),
        p_ci_high=heads("p_high"),
        statistic=heads("statistic"),
        ess=heads("ess"),
        detectable=heads("detectable"),
        correlation_length=of_type("correlation_length"),
        reach=of_type("reach"),
        p_value_gene=p_gene,
        p_value_adj_gene=adjust_p_values(p_gene, method=method),
        widths=widths,
        p_by_width=p_by_width,
        reasons=tuple(reasons),
    )
