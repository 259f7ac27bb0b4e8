"""One receiver type: its explained variance, its permutation tests, its ablations."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.evaluation.spatial_evaluation import spatial_test
from amici_eval.stats.ablation.ablations import TypeAblations, ablate
from amici_eval.stats.ablation.values import AblatedCells
from amici_eval.stats.cell_chunks import over_blocks
from amici_eval.stats.explained_variance import explained_variance
from amici_eval.stats.permutation.exact_moments import DRAWN_FOR_FEW, FEW_CELLS, permutation_moments
from amici_eval.stats.permutation.nulls import (
    MIN_CELLS_TEST,
    PermutationCounts,
    factor_draw,
    factor_exceedances,
    permutation_exceedances,
)
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.permutation.statistics import HeadFactors
from amici_eval.stats.pvalues import MAX_EXCEEDANCES, p_values, sequential_exceedances, tail_p_values
from amici_eval.stats.type_sums import TypeSums, factors_of, gather_sums, principal_factors, sums_of_predictions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from jaxtyping import Bool, Float, Float32, Float64, Int64

    from amici_eval.evaluation.protocols import FactorAccess, ModelAccess
    from amici_eval.evaluation.spatial_evaluation import TypeSpatial
    from amici_eval.settings.evaluation import PermutationSpec
    from amici_eval.stats.permutation.nulls import FactorDraw, FactorStatistics
    from amici_eval.stats.spatial.lag import CellPositions


@dataclass(frozen=True, kw_only=True, eq=False)
class FreeTest:
    """Result of the free test of one cell type.

    p and its Monte Carlo interval are NaN without a test; ``exceedances`` are -1 where nothing was counted;
    ``n_permutations`` is 0 if p follows from moments. ``method``: independent, cyclic, sequential, moments, or gpd
    where a tail was fitted. ``standardised`` and ``permuted``, kept for maxT only, are the observed and permuted
    statistics, standardised by their exact moments.
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
    heads = HeadFactors(factors=factors, images=images, dead=dead)
    if test.method == "moments" and n_cells < FEW_CELLS:
        counts = factor_exceedances(
            heads, stream=stream, n_permutations=DRAWN_FOR_FEW, device=device, n_threads=n_threads
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
            heads,
            stream=stream,
            n_permutations=n_permutations,
            sampling=sampling,
            device=device,
            n_threads=n_threads,
            progress=progress,
        )
        return counted(counts, test, sampling)
    draw = factor_draw(heads, stream=stream, device=device, n_threads=n_threads)
    if test.method == "sequential":
        return _sequential(draw, test, n_permutations, progress)
    statistics = draw(0, n_permutations)
    if progress is not None:
        progress(n_heads * n_permutations)
    return _in_full(statistics, factors, images, test, n_permutations, device)


def counted(counts: PermutationCounts, test: PermutationSpec, sampling: str) -> FreeTest:
    """Return the test from counts of exceedances."""
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
    # with fewer permutations than stop_at all of them are drawn
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
    """Return the test from the statistics of all permutations, which tails and maxT need."""
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


DEAD_TOLERANCE = 1e-6
"""A head whose predictions vary by less than this share of their size varies by float32 rounding alone."""
_NOT_FINITE = "the head's predictions are not finite"
_DEAD = "the head predicts the same for all cells (dead head)"


@dataclass(frozen=True, kw_only=True, eq=False)
class TypeEvaluation:
    """Results of the evaluation of one receiver type.

    ``expl_var*`` are of each head kept alone, ``full`` and ``none`` of the whole model and of the model without heads.
    ``free`` and ``spatial`` are None without a test, ``no_test`` says why; ``dead``: reasons by head. ``ablations`` are
    by mode, ``catalogue`` is the same and more from the factored engine. ``not_finite``: heads with an output that is
    not finite, so that ablations of the whole model are undefined.
    """

    expl_var_gene: Float64[np.ndarray, "heads genes"]
    expl_var: Float64[np.ndarray, " heads"]
    full: float
    none: float
    constant_genes: np.ndarray
    free: FreeTest | None = None
    dead: dict[int, str] = field(default_factory=dict)
    no_test: str | None = None
    spatial: TypeSpatial | None = None
    ablations: dict[str, Float64[np.ndarray, " heads"]] = field(default_factory=dict)
    catalogue: TypeAblations | None = None
    moments: TypeSums | None = None
    not_finite: tuple[int, ...] = ()


def evaluate_type_by_hooks(
    access: ModelAccess,
    cell_type: str,
    rows: Int64[np.ndarray, " cells"],
    tiles: Int64[np.ndarray, " cells"],
    *,
    test: PermutationSpec,
    n_permutations: int,
    modes: Sequence[str],
    place: CellPositions | None,
    on_cells: Callable[[int], None],
    on_permutations: Callable[[int], None],
) -> TypeEvaluation:
    """Evaluate one type from the predictions of each ablation, an array of cells x genes each."""
    n_heads, n_cells = access.card.n_heads, len(rows)
    targets = access.expression(rows)
    everyone = range(n_heads)
    without = [tuple(h for h in everyone if h != head) for head in everyone] if "leave_one_out" in modes else []
    keeps = [*((head,) for head in everyone), None, (), *without]
    predictions = access.predict(rows, keeps=keeps, progress=on_cells)
    fits = [explained_variance(prediction, targets) for prediction in predictions]
    heads, constant = predictions[:n_heads], fits[0].constant_genes
    ablations = {"keep_one": np.array([fit.aggregated for fit in fits[:n_heads]])}
    if without:
        ablations["leave_one_out"] = np.array([fit.aggregated for fit in fits[n_heads + 2 :]])
    no_test = _why_no_test(n_cells, constant)
    unmoving = np.array([_is_dead(prediction) for prediction in heads])
    free = spatial = None
    if no_test is None:
        sampling = _sampling(test.sampling, n_cells, n_permutations)
        if (sampling, test.method, test.tail) == ("independent", "monte_carlo", "none") and test.adjustment != "maxt":
            counts = permutation_exceedances(
                heads,
                targets,
                stream=PermutationStream(seed=test.seed, cell_type=cell_type, n_cells=n_cells),
                n_permutations=n_permutations,
                device=access.statistics_device,
                progress=on_permutations,
            )
            free, unmoving = counted(counts, test, sampling), counts.dead
        else:
            # predictions serve as factors of rank genes
            free = free_test(
                np.nan_to_num(heads.transpose(1, 2, 0)),
                np.repeat(targets[:, :, None], n_heads, axis=2),
                test=test,
                sampling=sampling,
                cell_type=cell_type,
                n_permutations=n_permutations,
                dead=unmoving,
                device=access.statistics_device,
                progress=on_permutations,
            )
    moments = sums_of_predictions(
        heads,
        predictions[n_heads],
        targets,
        tiles=tiles,
        place=place,
    )
    if no_test is None and place is not None:
        factors, weights = principal_factors(heads)
        spatial = spatial_test(
            factors,
            np.einsum("ng,hgr->nrh", targets - targets.mean(axis=0, dtype=np.float64), weights, optimize=True),
            moments,
            weights=weights,
            place=place,
            test=test,
            cell_type=cell_type,
            n_permutations=n_permutations,
            dead=unmoving,
            device=access.statistics_device,
            heartbeat=lambda _: on_permutations(0),
        )
    return TypeEvaluation(
        expl_var_gene=np.stack([fit.per_gene for fit in fits[:n_heads]]),
        expl_var=np.array([fit.aggregated for fit in fits[:n_heads]]),
        full=fits[n_heads].aggregated,
        none=fits[n_heads + 1].aggregated,
        constant_genes=constant,
        free=free,
        dead={}
        if no_test is not None
        else {int(head): _DEAD if np.isfinite(heads[head]).all() else _NOT_FINITE for head in np.flatnonzero(unmoving)},
        no_test=no_test,
        spatial=spatial,
        ablations=ablations,
        moments=moments.without_cells(),
    )


def evaluate_type_by_factors(
    access: FactorAccess,
    cell_type: str,
    rows: Int64[np.ndarray, " cells"],
    tiles: Int64[np.ndarray, " cells"],
    outputs: Float32[np.ndarray, "cells outputs"],
    *,
    test: PermutationSpec,
    n_permutations: int,
    modes: Sequence[str],
    place: CellPositions | None,
    without_nearest: Float32[np.ndarray, "cells outputs"] | None,
    on_permutations: Callable[[int], None],
    in_turn: AbstractContextManager[object] | None = None,
    n_threads: int | None = None,
) -> TypeEvaluation:
    """Evaluate one type from its attention outputs, without forming predictions of cells x genes.

    ``without_nearest``: the outputs with each cell's nearest neighbour masked, None if not wanted. Where several types
    are evaluated at a time, ``in_turn`` lets one test at a time run, on ``n_threads``.
    """
    n_heads, n_cells = access.card.n_heads, len(rows)
    readout = access.readout(cell_type)
    moments = over_blocks(
        lambda blocks: gather_sums(
            outputs,
            readout,
            blocks,
            tiles=tiles,
            place=place,
            without_nearest=without_nearest,
            device=access.statistics_device,
        ),
        lambda: access.expression_blocks(rows),
        what="moments",
        device=access.statistics_device,
    )
    explained = moments.by_tile.explained_variance
    overall, target_ss, constant_genes = explained[:-1], moments.by_tile.target_ss, ~moments.by_tile.varies
    catalogue = None
    # a comparison with NaN is False, so that predictions that are not finite are dead
    alive = moments.predicted_ss > DEAD_TOLERANCE**2 * moments.predicted_size
    by_head = np.isfinite(outputs).all(axis=0).reshape(n_heads, -1)
    not_finite = tuple(np.flatnonzero(~by_head.all(axis=1)).tolist())
    # keep-one is computed above, gene by gene
    others = [mode for mode in modes if mode != "keep_one"]
    if target_ss > 0.0 and not not_finite and others:
        catalogue = ablate(
            AblatedCells(z=outputs, projected=moments.projected, target_ss=target_ss, readout=readout),
            modes=others,
            seed=test.seed,
            cell_type=cell_type,
            device=access.statistics_device,
        )
    no_test = _why_no_test(n_cells, constant_genes)
    free = spatial = None
    if no_test is None:
        factors, images = factors_of(outputs, moments, readout)
        with in_turn or nullcontext():
            free = free_test(
                factors,
                images,
                test=test,
                sampling=_sampling(test.sampling, n_cells, n_permutations),
                cell_type=cell_type,
                n_permutations=n_permutations,
                dead=~alive,
                device=access.statistics_device,
                n_threads=n_threads,
                progress=on_permutations,
            )
        alive &= ~np.isnan(free.p)
        if place is not None:
            spatial = spatial_test(
                factors,
                images,
                moments,
                weights=np.stack([readout.weights[:, readout.columns([head])] for head in range(n_heads)]),
                place=place,
                test=test,
                cell_type=cell_type,
                n_permutations=n_permutations,
                dead=~alive,
                device=access.statistics_device,
                heartbeat=lambda _: on_permutations(0),
            )
    finite = np.isfinite(moments.predicted_ss)
    return TypeEvaluation(
        expl_var_gene=moments.by_tile.explained_variance_gene[:-1],
        expl_var=overall,
        full=float("nan") if not_finite else float(explained[-1]),
        # without heads a prediction is the same for all cells, so it explains nothing
        none=catalogue.none if catalogue is not None else 0.0 if target_ss > 0.0 else float("nan"),
        constant_genes=constant_genes,
        free=free,
        dead={}
        if no_test is not None
        else {int(head): _DEAD if finite[head] else _NOT_FINITE for head in np.flatnonzero(~alive)},
        no_test=no_test,
        spatial=spatial,
        ablations={"keep_one": overall}
        if catalogue is None
        else {mode: getattr(catalogue, mode) for mode in modes} | {"keep_one": overall},
        catalogue=catalogue,
        moments=moments.without_cells(),
        not_finite=not_finite,
    )


def _why_no_test(n_cells: int, constant_genes: np.ndarray) -> str | None:
    if n_cells < MIN_CELLS_TEST:
        return f"{n_cells} cells; a test needs at least {MIN_CELLS_TEST}"
    return f"no gene varies over the {n_cells} cells" if constant_genes.all() else None


def _sampling(asked: str, n_cells: int, n_permutations: int) -> str:
    """Return the sampling of a type; with fewer cyclic shifts (one per cell) than permutations it is independent."""
    return "independent" if n_cells < n_permutations + 1 else asked


def _is_dead(prediction: Float32[np.ndarray, "cells genes"]) -> bool:
    wide = prediction.astype(np.float64)
    spread = float(np.linalg.norm(wide - wide.mean(axis=0)))
    return not spread > DEAD_TOLERANCE * float(np.linalg.norm(wide))
