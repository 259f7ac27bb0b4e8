"""The evaluation of one receiver type: its explained variance, its permutation tests, its ablations."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np

from amici_eval.evaluation.head_tests import (
    FreeTest,
    HeadsUnderTest,
    TypeFactors,
    TypeSpatial,
    counted,
    free_test,
    only_counts,
    sampling_of,
    spatial_test,
)
from amici_eval.stats.ablation.ablations import TypeAblations, ablate
from amici_eval.stats.ablation.values import AblatedCells
from amici_eval.stats.cell_chunks import over_blocks
from amici_eval.stats.explained_variance import explained_variance
from amici_eval.stats.permutation.nulls import DEAD_TOLERANCE, MIN_CELLS_TEST, permutation_exceedances
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.spatial.lag import CellPositions
from amici_eval.stats.type_sums import TypeSums, gather_sums, sums_of_predictions

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from jaxtyping import Bool, Float32, Float64, Int64

    from amici_eval.evaluation.protocols import FactorAccess, ModelAccess
    from amici_eval.settings.evaluation import PermutationSpec
    from amici_eval.stats.readout import Readout


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TypeTask:
    """Data of the cells of one type, besides model and expression.

    ``rows``: evaluated cells in canonical order; ``keys``: tile and part of each
    (:class:`~amici_eval.evaluation.tiles.Tiling`); ``z``: attention outputs, None with the hooked engine;
    ``z_without_nearest``: the same with the nearest neighbour masked; ``coordinates`` and ``samples``: None if unknown
    or not needed.
    """

    cell_type: str
    rows: Int64[np.ndarray, " cells"]
    keys: Int64[np.ndarray, " cells"]
    z: Float32[np.ndarray, "cells outputs"] | None = None
    z_without_nearest: Float32[np.ndarray, "cells outputs"] | None = None
    coordinates: Float64[np.ndarray, "cells dimensions"] | None = None
    samples: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class TypeSettings:
    """Settings that all types share: the test, the number of permutations, and the ablation modes."""

    test: PermutationSpec
    n_permutations: int
    modes: tuple[str, ...]


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
    sums: TypeSums | None = None
    not_finite: tuple[int, ...] = ()


def evaluate_task(
    access: ModelAccess,
    task: TypeTask,
    settings: TypeSettings,
    *,
    on_cells: Callable[[int], None],
    on_permutations: Callable[[int], None],
    in_turn: AbstractContextManager[object] | None = None,
    n_threads: int | None = None,
) -> TypeEvaluation:
    """Evaluate one type from z if the task brings it, else from predictions of the hooked engine.

    Permutations are seeded by the name of the type, and nothing here depends on other types, so that the numbers depend
    neither on what else is evaluated nor on where. Where several types are evaluated at a time, ``in_turn`` lets one
    free test at a time run, on ``n_threads``.
    """
    place = None
    if task.coordinates is not None:
        place = CellPositions.of(task.coordinates, samples=task.samples, n_genes=len(access.card.genes))
    if task.z is None:
        return _by_hooks(access, task, settings, place, on_cells=on_cells, on_permutations=on_permutations)
    return _by_factors(
        cast("FactorAccess", access),
        task,
        task.z,
        settings,
        place,
        on_permutations=on_permutations,
        in_turn=in_turn,
        n_threads=n_threads,
    )


def _by_hooks(
    access: ModelAccess,
    task: TypeTask,
    settings: TypeSettings,
    place: CellPositions | None,
    *,
    on_cells: Callable[[int], None],
    on_permutations: Callable[[int], None],
) -> TypeEvaluation:
    """Evaluate one type from the predictions of each ablation, an array of cells x genes each."""
    n_heads, targets = access.card.n_heads, access.expression(task.rows)
    everyone = range(n_heads)
    without = (
        [tuple(h for h in everyone if h != head) for head in everyone] if "leave_one_out" in settings.modes else []
    )
    keeps = [*((head,) for head in everyone), None, (), *without]
    predictions = access.predict(task.rows, keeps=keeps, progress=on_cells)
    fits = [explained_variance(prediction, targets) for prediction in predictions]
    heads, constant_genes = predictions[:n_heads], fits[0].constant_genes
    explained = np.array([fit.aggregated for fit in fits])
    no_test = _why_no_test(len(task.rows), constant_genes)
    dead = np.array([_is_dead(prediction) for prediction in heads])
    type_sums = sums_of_predictions(heads, predictions[n_heads], targets, tiles=task.keys, place=place)
    free = spatial = None
    if no_test is None:
        test, n_permutations, device = settings.test, settings.n_permutations, access.statistics_device
        under_test = partial(
            HeadsUnderTest, cell_type=task.cell_type, test=test, n_permutations=n_permutations, device=device
        )
        sampling = sampling_of(test, n_cells=len(task.rows), n_permutations=n_permutations)
        if only_counts(test) and sampling == "independent":
            counts = permutation_exceedances(
                heads,
                targets,
                stream=PermutationStream(seed=test.seed, cell_type=task.cell_type, n_cells=len(task.rows)),
                n_permutations=n_permutations,
                device=device,
                progress=on_permutations,
            )
            free, dead = counted(counts, test, sampling), counts.dead
        else:
            as_factors = TypeFactors.from_predictions(heads, targets)
            free = free_test(under_test(heads=as_factors, dead=dead, progress=on_permutations))
            # as large as the predictions
            del as_factors
        if place is not None:
            factors = TypeFactors.from_principal_components(heads, targets)
            asked = under_test(heads=factors, dead=dead, progress=lambda _: on_permutations(0))
            spatial = spatial_test(asked, type_sums, place)
    ablations = {"keep_one": explained[:n_heads]}
    if without:
        ablations["leave_one_out"] = explained[n_heads + 2 :]
    return TypeEvaluation(
        expl_var_gene=np.stack([fit.per_gene for fit in fits[:n_heads]]),
        expl_var=explained[:n_heads],
        full=fits[n_heads].aggregated,
        none=fits[n_heads + 1].aggregated,
        constant_genes=constant_genes,
        free=free,
        dead={}
        if no_test is not None
        else _why_dead(dead, np.array([np.isfinite(prediction).all() for prediction in heads])),
        no_test=no_test,
        spatial=spatial,
        ablations=ablations,
        sums=type_sums.without_cells(),
    )


def _by_factors(
    access: FactorAccess,
    task: TypeTask,
    z: Float32[np.ndarray, "cells outputs"],
    settings: TypeSettings,
    place: CellPositions | None,
    *,
    on_permutations: Callable[[int], None],
    in_turn: AbstractContextManager[object] | None,
    n_threads: int | None,
) -> TypeEvaluation:
    """Evaluate one type from z, without forming predictions of cells x genes."""
    readout = access.readout(task.cell_type)
    type_sums = _sums_by_tile(access, task, z, readout, place)
    explained, target_ss = type_sums.by_tile.explained_variance, type_sums.by_tile.target_ss
    constant_genes = ~type_sums.by_tile.varies
    finite_heads = np.isfinite(z).all(axis=0).reshape(access.card.n_heads, -1).all(axis=1)
    not_finite = tuple(np.flatnonzero(~finite_heads).tolist())
    catalogue = None if not_finite else _catalogue(access, task, z, type_sums, readout, settings)
    # a comparison with NaN is False, so that predictions that are not finite are dead
    alive = type_sums.predicted_ss > DEAD_TOLERANCE**2 * type_sums.predicted_size
    no_test = _why_no_test(len(task.rows), constant_genes)
    free = spatial = None
    if no_test is None:
        under_test = partial(
            HeadsUnderTest,
            cell_type=task.cell_type,
            heads=TypeFactors.from_z(z, type_sums, readout),
            test=settings.test,
            n_permutations=settings.n_permutations,
            device=access.statistics_device,
        )
        with in_turn or nullcontext():
            free = free_test(under_test(dead=~alive, progress=on_permutations), n_threads=n_threads)
        alive &= ~np.isnan(free.p)
        if place is not None:
            asked = under_test(dead=~alive, progress=lambda _: on_permutations(0))
            spatial = spatial_test(asked, type_sums, place)
    # without heads a prediction is the same for all cells, so it explains nothing
    none = 0.0 if target_ss > 0.0 else float("nan")
    ablations = {} if catalogue is None else {mode: getattr(catalogue, mode) for mode in settings.modes}
    return TypeEvaluation(
        expl_var_gene=type_sums.by_tile.explained_variance_gene[:-1],
        expl_var=explained[:-1],
        full=float("nan") if not_finite else float(explained[-1]),
        none=none if catalogue is None else catalogue.none,
        constant_genes=constant_genes,
        free=free,
        dead={} if no_test is not None else _why_dead(~alive, np.isfinite(type_sums.predicted_ss)),
        no_test=no_test,
        spatial=spatial,
        ablations={**ablations, "keep_one": explained[:-1]},
        catalogue=catalogue,
        sums=type_sums.without_cells(),
        not_finite=not_finite,
    )


def _sums_by_tile(
    access: FactorAccess,
    task: TypeTask,
    z: Float32[np.ndarray, "cells outputs"],
    readout: Readout,
    place: CellPositions | None,
) -> TypeSums:
    """Return the sums by tile from one pass over the cells' expression, which is never held as a whole."""
    return over_blocks(
        lambda blocks: gather_sums(
            z,
            readout,
            blocks,
            tiles=task.keys,
            place=place,
            without_nearest=task.z_without_nearest,
            device=access.statistics_device,
        ),
        lambda: access.expression_blocks(task.rows),
        what="moments",
        device=access.statistics_device,
    )


def _catalogue(
    access: FactorAccess,
    task: TypeTask,
    z: Float32[np.ndarray, "cells outputs"],
    type_sums: TypeSums,
    readout: Readout,
    settings: TypeSettings,
) -> TypeAblations | None:
    """Return the ablations besides keep-one, which the sums by tile give gene by gene; None if there are none."""
    others = [mode for mode in settings.modes if mode != "keep_one"]
    if not others or not type_sums.by_tile.target_ss > 0.0:
        return None
    return ablate(
        AblatedCells(z=z, projected=type_sums.projected, target_ss=type_sums.by_tile.target_ss, readout=readout),
        modes=others,
        seed=settings.test.seed,
        cell_type=task.cell_type,
        device=access.statistics_device,
    )


def _why_dead(dead: Bool[np.ndarray, " heads"], finite: Bool[np.ndarray, " heads"]) -> dict[int, str]:
    return {int(head): _DEAD if finite[head] else _NOT_FINITE for head in np.flatnonzero(dead)}


def _why_no_test(n_cells: int, constant_genes: np.ndarray) -> str | None:
    if n_cells < MIN_CELLS_TEST:
        return f"{n_cells} cells; a test needs at least {MIN_CELLS_TEST}"
    return f"no gene varies over the {n_cells} cells" if constant_genes.all() else None


def _is_dead(prediction: Float32[np.ndarray, "cells genes"]) -> bool:
    wide = prediction.astype(np.float64)
    spread = float(np.linalg.norm(wide - wide.mean(axis=0)))
    return not spread > DEAD_TOLERANCE * float(np.linalg.norm(wide))
