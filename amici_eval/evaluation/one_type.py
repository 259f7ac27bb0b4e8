"""One receiver type, evaluated by either engine: the same numbers by two ways."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.evaluation.free_test import FreeTest, counted, free_test
from amici_eval.evaluation.spatial_evaluation import spatial_test
from amici_eval.stats.ablation.ablations import TypeAblations, ablate
from amici_eval.stats.cell_chunks import over_blocks
from amici_eval.stats.explained_variance import explained_variance
from amici_eval.stats.permutation.moments import TypeMoments, factors_of, gather_moments
from amici_eval.stats.permutation.nulls import MIN_CELLS_TEST, permutation_exceedances
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.permutation.plain_moments import moments_of_predictions, principal_factors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from jaxtyping import Float32, Float64, Int64

    from amici_eval.evaluation.protocols import FactorAccess, ModelAccess
    from amici_eval.evaluation.spatial_evaluation import TypeSpatial
    from amici_eval.settings.permutation import PermutationSpec
    from amici_eval.stats.spatial.positions import CellPositions

__all__ = ["TypeEvaluation", "evaluate_type_by_factors", "evaluate_type_by_hooks"]

DEAD_TOLERANCE = 1e-6
"""A head whose predictions vary by less than this share of their size varies by float32 rounding alone."""
_NOT_FINITE = "the head's predictions are not finite"
_DEAD = "the head predicts the same for all cells (dead head)"


@dataclass(frozen=True, kw_only=True, eq=False)
class TypeEvaluation:
    """What the evaluation of one receiver type gives.

    Parameters
    ----------
    expl_var_gene, expl_var
        Of each head kept alone, shape (heads, genes) and (heads,).
    full, none
        Of the whole model and of the model without heads, over all genes.
    constant_genes
        Genes that do not vary over the cells.
    free
        The free test; ``None`` without one.
    dead
        Reasons by head number.
    no_test
        Why no head has a test, if that is so.
    spatial
        The test that holds in tissue; ``None`` without one.
    ablations
        Explained variance by mode, shape (heads,) each.
    catalogue
        The same and more from the factored engine.
    moments
        Without what is kept per cell.
    not_finite
        Heads whose output is not finite in some cell, so that ablations of the whole model are undefined.
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
    moments: TypeMoments | None = None
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
    """Evaluate one type from predictions of every ablation, cells x genes each."""
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
            # predictions are factors too: as many as there are genes
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
    moments = moments_of_predictions(
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
    """Evaluate one type from what attention brought to its cells; no prediction of cells x genes is formed.

    ``without_nearest`` is what it brought without the nearest neighbour of each, if what that explains is wanted.
    Where several types are evaluated at a time, ``in_turn`` lets one test at a time run, on ``n_threads``.
    """
    n_heads, n_cells = access.card.n_heads, len(rows)
    readout = access.readout(cell_type)
    moments = over_blocks(
        lambda blocks: gather_moments(
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
    per_gene, overall = moments.explained_variance()
    target_ss = moments.target_ss
    catalogue = None
    # asked this way round, a prediction that is not finite is dead
    alive = moments.predicted_ss > DEAD_TOLERANCE**2 * moments.predicted_size
    by_head = np.isfinite(outputs).all(axis=0).reshape(n_heads, -1)
    not_finite = tuple(np.flatnonzero(~by_head.all(axis=1)).tolist())
    # keep-one is there already, gene by gene
    others = [mode for mode in modes if mode != "keep_one"]
    if target_ss > 0.0 and not not_finite and others:
        catalogue = ablate(
            outputs,
            moments.projected,
            target_ss,
            readout,
            modes=others,
            seed=test.seed,
            cell_type=cell_type,
            device=access.statistics_device,
        )
    no_test = _why_no_test(n_cells, moments.constant_genes)
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
        expl_var_gene=per_gene,
        expl_var=overall,
        full=float("nan") if not_finite else moments.explained_by_all,
        # without heads a prediction is the same for all cells, so it explains nothing
        none=catalogue.none if catalogue is not None else 0.0 if target_ss > 0.0 else float("nan"),
        constant_genes=moments.constant_genes,
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
    """Return the sampling of a type: a cyclic group has no more shifts than cells, too few to reach a small p."""
    return "independent" if n_cells < n_permutations + 1 else asked


def _is_dead(prediction: Float32[np.ndarray, "cells genes"]) -> bool:
    wide = prediction.astype(np.float64)
    spread = float(np.linalg.norm(wide - wide.mean(axis=0)))
    return not spread > DEAD_TOLERANCE * float(np.linalg.norm(wide))
