"""Evaluate the heads of a model on a tissue."""

from __future__ import annotations

import logging
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from amici_eval.ablation_results import HeadAblations
from amici_eval.moments import Moments
from amici_eval.parity import Parity, check_parity
from amici_eval.progress import Meter, PermutationMeter, Progress
from amici_eval.results import HeadEvaluation, Undefined
from amici_eval.side_by_side import run_side_by_side
from amici_eval.specs import EvaluationSpec, default_n_permutations
from amici_eval.stats.explained_variance import MIN_CELLS_EXPLAINED_VARIANCE
from amici_eval.stats.multiplicity import adjust_p_values
from amici_eval.stats.pvalues import p_values
from amici_eval.stats.spatial import square_tiles
from amici_eval.type_evaluation import (
    FactorAccess,
    TypeEvaluation,
    evaluate_type_by_factors,
    evaluate_type_by_hooks,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from anndata import AnnData

    from amici_eval.model.access import ModelAccess

__all__ = ["Progress", "evaluate", "evaluate_access"]

logger = logging.getLogger(__name__)

_FEWEST_TILES, _MOST_TILES, _CELLS_PER_TILE = 9, 36, 100
_SKETCHED_CELLS = 256
_SIDE_BY_SIDE_CELLS = 4096
"""Types of at most so many cells are tested several at a time, on one thread each: their arrays are small."""


def evaluate(
    model: Any,
    adata: AnnData | None = None,
    spec: EvaluationSpec | None = None,
    *,
    progress: Progress | None = None,
    model_info: Mapping[str, Any] | None = None,
    data_info: Mapping[str, Any] | None = None,
) -> HeadEvaluation:
    """Learn which attention heads explain which receiver cell types and genes, and how sure that is.

    Parameters
    ----------
    model
        What :func:`amici_eval.load_model` returns, or a live, trained ``amici.AMICI`` (or a subclass).
    adata
        The whole tissue; cells are chosen with ``spec.data.subset``, never by cutting the AnnData, so that every cell
        keeps its neighbours. ``None`` takes the AnnData of a live model.
    spec
        Settings; the defaults reproduce the reference's test with valid p-values.
    progress
        Told how far the work is.
    model_info, data_info
        Plain values that name model and data in the result.

    Returns
    -------
    HeadEvaluation
        Explained variance of every head kept alone, with permutation p-values, and the reasons for what is undefined.

    Raises
    ------
    AmiciEvalError
        If model, data or device do not fit; before any long work.

    Notes
    -----
    Nothing that is handed in changes: not the AnnData, not the model (hooks, training flags, device), no random state.
    """
    from amici_eval.errors import DataError
    from amici_eval.model.access import open_access, resolve_device
    from amici_eval.model.checkpoint import card_of
    from amici_eval.tissue import prepare

    spec = spec or EvaluationSpec()
    if adata is None:
        adata = getattr(model, "adata", None)
        if adata is None:
            raise DataError(
                value="no data was given",
                rule="a model loaded from MLflow holds no AnnData",
                fix="call evaluate(model, adata)",
            )
    resolve_device(spec.ablation.device)
    tissue = prepare(adata, card_of(model, adata=adata), spec.data)
    with open_access(model, tissue, spec.ablation) as access:
        return evaluate_access(access, spec, progress=progress, model_info=model_info, data_info=data_info)


def evaluate_access(
    access: ModelAccess,
    spec: EvaluationSpec,
    *,
    progress: Progress | None = None,
    model_info: Mapping[str, Any] | None = None,
    data_info: Mapping[str, Any] | None = None,
) -> HeadEvaluation:
    """Evaluate anything that offers :class:`~amici_eval.model.access.ModelAccess`; see :func:`evaluate`.

    An access that offers :class:`~amici_eval.type_evaluation.FactorAccess` is first checked against its own hooked
    engine on some cells of each type; if they disagree, the hooked engine does the work.
    """
    receivers = access.receivers()
    engine, parity, notes = "hooked", Parity(), access.notes
    if isinstance(access, FactorAccess):
        parity = check_parity(access, receivers)
        if parity.holds:
            engine = "factored"
        else:
            notes = (*notes, parity.complaint)
            logger.warning("%s", parity.complaint)
            access = access.hooked
    modes = spec.ablation.modes_of(engine)
    left_out = [mode for mode in spec.ablation.modes_of(spec.ablation.engine) if mode not in modes]
    if left_out:
        notes = (*notes, f"not computed, for it needs the factored engine: {', '.join(left_out)}")
        logger.warning("%s", notes[-1])

    types, n_heads, genes = tuple(receivers), access.card.n_heads, access.card.genes
    test = spec.permutation
    n_permutations = test.n_permutations or default_n_permutations(n_heads, len(types), test.alpha)
    evaluated, moments, undefined = _by_type(
        access, receivers, spec, n_permutations=n_permutations, modes=modes, progress=progress
    )

    exceedances = _stack([None if item is None else item.exceedances for item in evaluated], (n_heads,), fill=-1)
    drawn = np.array([0 if item is None else item.n_permutations for item in evaluated], dtype=np.int64)
    defined = exceedances >= 0
    raw = p_values(np.where(defined, exceedances, 0), n_permutations=np.maximum(drawn, 1), convention=test.convention)
    p = np.where(defined, raw.p, np.nan)
    for cell_type, item in zip(types, evaluated, strict=True):
        if item is not None and item.not_finite:
            heads = ", ".join(map(str, item.not_finite))
            notes = (*notes, f"{cell_type}: ablations are undefined, for outputs of heads {heads} are not finite")
            logger.warning("%s", notes[-1])
    for thing in undefined:
        if thing.gene is None:
            where = "all heads" if thing.head is None else f"head {thing.head}"
            logger.warning("undefined for %s, %s: %s", thing.cell_type, where, thing.reason)
    return HeadEvaluation(
        n_heads=n_heads,
        cell_types=types,
        genes=genes,
        n_cells=np.array([len(rows) for rows in receivers.values()], dtype=np.int64),
        expl_var_gene=_stack([None if i is None else i.expl_var_gene for i in evaluated], (n_heads, len(genes))),
        expl_var=_stack([None if i is None else i.expl_var for i in evaluated], (n_heads,)),
        expl_var_full=np.array([np.nan if i is None else i.full for i in evaluated]),
        expl_var_none=np.array([np.nan if i is None else i.none for i in evaluated]),
        exceedances=exceedances,
        n_permutations=n_permutations,
        p_value=p,
        p_value_adj=adjust_p_values(p, method=test.adjustment),
        p_ci_low=np.where(defined, raw.ci_low, np.nan),
        p_ci_high=np.where(defined, raw.ci_high, np.nan),
        held_out=tuple(_held_out(access, rows) for rows in receivers.values()),
        spec=spec,
        undefined=tuple(undefined),
        notes=notes,
        model=dict(model_info or {}),
        data=dict(data_info or {}),
        engine=engine,
        parity=parity.largest_difference,
        parity_cells=parity.n_cells,
        n_permutations_by_type=drawn,
        sampling=tuple("" if item is None else item.sampling for item in evaluated),
        ablations=_ablations(evaluated, modes, n_heads),
        moments=moments,
    )


def _by_type(
    access: ModelAccess,
    receivers: Mapping[str, np.ndarray],
    spec: EvaluationSpec,
    *,
    n_permutations: int,
    modes: tuple[str, ...],
    progress: Progress | None,
) -> tuple[list[TypeEvaluation | None], Moments | None, list[Undefined]]:
    """Evaluate type by type; ``None`` stands for a type with too few cells."""
    n_heads = access.card.n_heads
    factored = isinstance(access, FactorAccess)
    cells_work = 1 if factored else n_heads + 2 + (n_heads if "leave_one_out" in modes else 0)
    # what a permutation costs beside a cell's way through the model, roughly
    test_work = n_permutations / 1000 if factored else float(n_heads)
    usable = {cell_type: rows for cell_type, rows in receivers.items() if len(rows) >= MIN_CELLS_EXPLAINED_VARIANCE}
    n_receivers = sum(len(rows) for rows in receivers.values())
    meter = Meter(progress, total=n_receivers * (cells_work + test_work))
    everyone = np.concatenate([*usable.values(), np.zeros(0, dtype=np.int64)]).astype(np.int64)
    outputs = tiles = None
    if isinstance(access, FactorAccess) and len(everyone):
        outputs = access.head_outputs(everyone, progress=meter.cells("attention", len(everyone)))
        samples = access.samples(everyone)
        sections = 1 if samples is None else len(set(samples.tolist()))
        n_tiles = _n_tiles(len(everyone), len(usable), sections)
        tiles = square_tiles(access.coordinates(everyone), n_tiles=n_tiles, samples=samples)

    def evaluate_type(cell_type: str, own: slice, on_permutations: Callable[[int], None]) -> TypeEvaluation:
        rows = receivers[cell_type]
        if isinstance(access, FactorAccess) and outputs is not None and tiles is not None:
            return evaluate_type_by_factors(
                access,
                cell_type,
                rows,
                outputs[own],
                tiles[own],
                test=spec.permutation,
                n_permutations=n_permutations,
                modes=modes,
                on_permutations=on_permutations,
                # the rows of a large type fill the cache, so that two such tests would be in each other's way; the
                # transforms of the cyclic one are done in a moment
                in_turn=None if len(rows) <= _SIDE_BY_SIDE_CELLS or cyclic else turn,
                n_threads=None if len(rows) <= _SIDE_BY_SIDE_CELLS else n_threads,
            )
        return evaluate_type_by_hooks(
            access,
            cell_type,
            rows,
            test=spec.permutation,
            n_permutations=n_permutations,
            modes=modes,
            on_cells=meter.cells(cell_type, len(rows) * cells_work),
            on_permutations=on_permutations,
        )

    n_threads, turn = torch.get_num_threads(), Lock()
    cyclic = spec.permutation.sampling == "cyclic"
    # a type with most of the cells would keep one thread busy while the others wait
    small = max(_SIDE_BY_SIDE_CELLS, n_receivers // (2 * n_threads))
    counters: dict[str, PermutationMeter] = {}
    alone: dict[str, Callable[[], TypeEvaluation]] = {}
    together: dict[str, Callable[[Callable[[int], None]], TypeEvaluation]] = {}
    start = 0
    for cell_type, rows in usable.items():
        own = slice(start, start + len(rows))
        start = own.stop
        count = meter.permutations(cell_type, work=len(rows) * test_work, pieces=n_heads * n_permutations)
        counters[cell_type] = count
        if factored and len(rows) <= small and access.statistics_device == "cpu":
            together[cell_type] = partial(evaluate_type, cell_type, own)
        else:
            alone[cell_type] = partial(evaluate_type, cell_type, own, count)
    found: dict[str, TypeEvaluation] = {}
    for cell_type, evaluate_alone in alone.items():
        found[cell_type] = evaluate_alone()
        counters[cell_type].finish()
    for cell_type, result in run_side_by_side(together, counters):
        found[cell_type] = result
        counters[cell_type].finish()

    undefined: list[Undefined] = []
    for cell_type, rows in receivers.items():
        n_cells = len(rows)
        if cell_type not in found:
            reason = f"{n_cells} cell; explained variance needs at least {MIN_CELLS_EXPLAINED_VARIANCE}"
            undefined.append(Undefined(cell_type=cell_type, reason=reason))
            meter.add(n_cells * (cells_work + test_work), cell_type)
            continue
        undefined += [
            Undefined(
                cell_type=cell_type, gene=gene, reason=f"the gene has one value in all {n_cells} cells of the type"
            )
            for gene, constant in zip(access.card.genes, found[cell_type].constant_genes, strict=True)
            if constant
        ]
        no_test = found[cell_type].no_test
        if no_test is not None:
            undefined.append(Undefined(cell_type=cell_type, reason=no_test))
        undefined += [
            Undefined(cell_type=cell_type, head=head, reason=why) for head, why in found[cell_type].dead.items()
        ]
    evaluated = [found.get(cell_type) for cell_type in receivers]
    moments = None
    if isinstance(access, FactorAccess) and outputs is not None and tiles is not None:
        moments = _moments(access, receivers, usable, evaluated, outputs, tiles)
    return evaluated, moments, undefined


def _n_tiles(n_cells: int, n_types: int, n_sections: int) -> int:
    """Return into how many tiles a section is cut for the moments: one with a handful of cells would say little."""
    in_all = int(np.clip(n_cells // (n_types * _CELLS_PER_TILE), _FEWEST_TILES, _MOST_TILES))
    return max(1, in_all // n_sections)


def _stack(parts: Sequence[np.ndarray | None], shape: tuple[int, ...], fill: float = np.nan) -> np.ndarray:
    """Put what each type gave side by side along the second axis; types without a result are filled."""
    dtype = np.float64 if np.isnan(fill) else np.int64
    empty = np.full(shape, fill, dtype=dtype)
    return np.stack([empty if part is None else part for part in parts], axis=1).astype(dtype)


def _ablations(
    evaluated: Sequence[TypeEvaluation | None], modes: tuple[str, ...], n_heads: int
) -> HeadAblations | None:
    if modes == ("keep_one",):
        return None
    missing, square = np.full(n_heads, np.nan), np.full((n_heads, n_heads), np.nan)

    def of(item: TypeEvaluation | None, name: str, empty: np.ndarray) -> np.ndarray:
        found = None if item is None or item.catalogue is None else getattr(item.catalogue, name)
        return empty if found is None else found

    return HeadAblations(
        modes=modes,
        expl_var=np.stack(
            [
                np.stack([missing if i is None else i.ablations.get(mode, missing) for i in evaluated], axis=1)
                for mode in modes
            ]
        ),
        standard_error=np.stack([of(item, "shapley_standard_error", missing) for item in evaluated], axis=1),
        interaction=np.stack([of(item, "interaction", square) for item in evaluated]),
        frozen_interaction=np.stack([of(item, "frozen_interaction", square) for item in evaluated]),
    )


def _moments(
    access: FactorAccess,
    receivers: Mapping[str, np.ndarray],
    usable: Mapping[str, np.ndarray],
    evaluated: Sequence[TypeEvaluation | None],
    outputs: np.ndarray,
    tiles: np.ndarray,
) -> Moments:
    types = tuple(receivers)
    xy = access.coordinates(np.concatenate(list(usable.values())))[:, :2]
    centers = np.stack([np.bincount(tiles, weights=column) for column in xy.T], axis=1) / np.bincount(tiles)[:, None]
    parts = [
        (index, item.moments) for index, item in enumerate(evaluated) if item is not None and item.moments is not None
    ]
    sketch_type, sketch_rows, sketch_places = [], [], []
    start = 0
    for cell_type, rows in usable.items():
        chosen = np.linspace(0, len(rows) - 1, min(len(rows), _SKETCHED_CELLS)).astype(np.int64)
        sketch_type.append(np.full(len(chosen), types.index(cell_type), dtype=np.int64))
        sketch_rows.append(rows[chosen])
        sketch_places.append(start + chosen)
        start += len(rows)
    readouts = [access.readout(cell_type) for cell_type in types]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for _, part in parts])

    return Moments(
        cell_types=types,
        genes=access.card.genes,
        n_heads=access.card.n_heads,
        row_type=np.concatenate([np.full(len(part.tiles), index, dtype=np.int64) for index, part in parts]),
        row_tile=joined("tiles"),
        n_cells=joined("n_cells"),
        target_mean=joined("target_mean").astype(np.float32),
        target_m2=joined("target_m2").astype(np.float32),
        residual_mean=joined("residual_mean").astype(np.float32),
        residual_m2=joined("residual_m2").astype(np.float32),
        sketch_type=np.concatenate(sketch_type),
        sketch_names=tuple(access.cell_names(np.concatenate(sketch_rows))),
        sketch_outputs=outputs[np.concatenate(sketch_places)],
        tile_center=centers,
        query_weights=np.stack([readout.weights[:, 0] for readout in readouts]).astype(np.float32),
        head_weights=readouts[0].weights[:, 1:].astype(np.float32),
        query_gram=np.stack([readout.gram[0] for readout in readouts]),
        head_gram=readouts[0].gram[1:, 1:],
        readout_offset=np.stack([readout.offset for readout in readouts]),
        readout_epsilon=np.array([readouts[0].epsilon]),
    )


def _held_out(access: ModelAccess, rows: np.ndarray) -> bool | None:
    training = access.card.training_cells
    return None if training is None else training.isdisjoint(access.cell_names(rows))
