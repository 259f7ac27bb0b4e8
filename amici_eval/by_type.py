"""Evaluate type after type, small ones side by side, and what is asked of all types together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch

from amici_eval.baselines import WithoutNearest, evaluate_baselines, explained_without_nearest
from amici_eval.inference import tile_numbers
from amici_eval.moments import Moments
from amici_eval.progress import Meter, PermutationMeter, Progress
from amici_eval.results import Undefined
from amici_eval.side_by_side import run_side_by_side
from amici_eval.spatial_evaluation import Place
from amici_eval.stats.explained_variance import MIN_CELLS_EXPLAINED_VARIANCE
from amici_eval.stats.spatial import square_tiles, tile_side
from amici_eval.type_evaluation import (
    FactorAccess,
    TypeEvaluation,
    evaluate_type_by_factors,
    evaluate_type_by_hooks,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jaxtyping import Float32, Float64, Int64

    from amici_eval.inference_results import Baselines
    from amici_eval.model.access import ModelAccess
    from amici_eval.specs import EvaluationSpec

__all__ = ["LocatedAccess", "Types", "evaluate_types"]

_FEWEST_TILES, _MOST_TILES, _CELLS_PER_TILE = 9, 36, 100
_SKETCHED_CELLS = 256
_SIDE_BY_SIDE_CELLS = 4096
"""Types of at most so many cells are tested several at a time, on one thread each: their arrays are small."""


@runtime_checkable
class LocatedAccess(Protocol):
    """A model on a tissue of which it is known where the cells lie."""

    def coordinates(self, rows: Int64[np.ndarray, " cells"]) -> Float64[np.ndarray, "cells dimensions"]:
        """Return where some cells lie."""
        ...

    def samples(self, rows: Int64[np.ndarray, " cells"]) -> np.ndarray | None:
        """Return the section of some cells, if a sample column was named."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Types:
    """What the evaluation of all types gives.

    Parameters
    ----------
    evaluated
        By type, in the order of the receivers; ``None`` stands for a type with too few cells.
    undefined
        What has no value, and why.
    moments
        From the factored engine.
    baselines
        If they were asked for, from the factored engine.
    tile_width
        Side of the tiles, in coordinate units; ``None``: it is not known where cells lie.
    """

    evaluated: list[TypeEvaluation | None]
    undefined: list[Undefined]
    moments: Moments | None = None
    baselines: Baselines | None = None
    tile_width: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tiles:
    """Tiles of the evaluated cells, in the order of ``rows``: their numbers, told apart by part, centres and width."""

    numbers: Int64[np.ndarray, " cells"]
    centers: Float64[np.ndarray, "tiles two"]
    width: float


def evaluate_types(
    access: ModelAccess,
    receivers: Mapping[str, Int64[np.ndarray, " cells"]],
    spec: EvaluationSpec,
    *,
    n_permutations: int,
    modes: tuple[str, ...],
    progress: Progress | None,
) -> Types:
    """Evaluate all types.

    Parameters
    ----------
    access
        The model on the tissue.
    receivers
        Evaluated rows by type.
    spec, n_permutations, modes
        Settings.
    progress
        Told how far the work is.
    """
    usable = {cell_type: rows for cell_type, rows in receivers.items() if len(rows) >= MIN_CELLS_EXPLAINED_VARIANCE}
    everyone = np.concatenate([*usable.values(), np.zeros(0, dtype=np.int64)]).astype(np.int64)
    n_heads, n_receivers = access.card.n_heads, sum(len(rows) for rows in receivers.values())
    factors = access if isinstance(access, FactorAccess) and len(everyone) else None
    # work counts cells once for their way through the model; a permutation's cost beside that, roughly
    cells_work = 1.0 if factors is not None else n_heads + 2.0 + (n_heads if "leave_one_out" in modes else 0)
    test_work = n_permutations / 1000 if factors is not None else float(n_heads)
    with_baselines = spec.ablation.baselines and factors is not None
    meter = Meter(progress, total=n_receivers * (cells_work + test_work + with_baselines))
    outputs = nearest = None
    if factors is not None:
        count = meter.cells("attention", len(everyone))
        if spec.ablation.baselines and spec.ablation.without_nearest:
            both = factors.head_outputs_both(everyone, progress=count)
            outputs, nearest = both.whole, both.without_nearest
        else:
            outputs = factors.head_outputs(everyone, progress=count)
    tiles = _tiles(access, usable, everyone) if isinstance(access, LocatedAccess) and len(everyone) else None
    numbers = np.zeros(len(everyone), dtype=np.int64) if tiles is None else tiles.numbers
    found = _each(
        access,
        receivers,
        usable,
        spec,
        n_permutations=n_permutations,
        modes=modes,
        outputs=outputs,
        tiles=numbers,
        meter=meter,
        cells_work=cells_work,
        test_work=test_work,
    )
    evaluated = [found.get(cell_type) for cell_type in receivers]
    moments = baselines = None
    if factors is not None and outputs is not None and tiles is not None:
        moments = _moments(factors, receivers, usable, evaluated, outputs, tiles)
    if with_baselines and factors is not None:
        masked = None if nearest is None else _without_nearest(factors, receivers, usable, nearest)
        baselines = evaluate_baselines(
            factors,
            receivers,
            expl_var=np.stack([np.full(n_heads, np.nan) if i is None else i.expl_var for i in evaluated], axis=1),
            expl_var_full=np.array([np.nan if item is None else item.full for item in evaluated]),
            fitted_names=_fitted_names(factors, usable),
            without_nearest=masked,
            progress=meter.cells("baselines", n_receivers),
        )
    return Types(
        evaluated=evaluated,
        undefined=_undefined(access, receivers, found),
        moments=moments,
        baselines=baselines,
        tile_width=None if tiles is None else tiles.width,
    )


def _each(
    access: ModelAccess,
    receivers: Mapping[str, Int64[np.ndarray, " cells"]],
    usable: Mapping[str, Int64[np.ndarray, " cells"]],
    spec: EvaluationSpec,
    *,
    n_permutations: int,
    modes: tuple[str, ...],
    outputs: Float32[np.ndarray, "cells outputs"] | None,
    tiles: Int64[np.ndarray, " cells"],
    meter: Meter,
    cells_work: float,
    test_work: float,
) -> dict[str, TypeEvaluation]:
    n_threads, turn = torch.get_num_threads(), Lock()
    test = spec.permutation
    n_receivers = sum(len(rows) for rows in receivers.values())

    def evaluate_type(cell_type: str, own: slice, on_permutations: Callable[[int], None]) -> TypeEvaluation:
        rows, place = usable[cell_type], None
        if isinstance(access, LocatedAccess) and test.spatial_null != "none":
            coordinates, samples = access.coordinates(usable[cell_type]), access.samples(usable[cell_type])
            place = Place.of(coordinates, samples, n_genes=len(access.card.genes))
        if isinstance(access, FactorAccess) and outputs is not None:
            large = len(rows) > _SIDE_BY_SIDE_CELLS
            return evaluate_type_by_factors(
                access,
                cell_type,
                rows,
                tiles[own],
                outputs[own],
                test=test,
                n_permutations=n_permutations,
                modes=modes,
                place=place,
                on_permutations=on_permutations,
                # the rows of a large type fill the cache, so that two such tests would be in each other's way; the
                # transforms of the cyclic one are done in a moment
                in_turn=turn if large and test.sampling != "cyclic" else None,
                n_threads=n_threads if large else None,
            )
        return evaluate_type_by_hooks(
            access,
            cell_type,
            rows,
            tiles[own],
            test=test,
            n_permutations=n_permutations,
            modes=modes,
            place=place,
            on_cells=meter.cells(cell_type, round(len(rows) * cells_work)),
            on_permutations=on_permutations,
        )

    # a type with most of the cells would keep one thread busy while the others wait
    small = max(_SIDE_BY_SIDE_CELLS, n_receivers // (2 * n_threads))
    counters: dict[str, PermutationMeter] = {}
    alone: dict[str, Callable[[], TypeEvaluation]] = {}
    together: dict[str, Callable[[Callable[[int], None]], TypeEvaluation]] = {}
    start = 0
    for cell_type, rows in usable.items():
        own = slice(start, start + len(rows))
        start = own.stop
        pieces = access.card.n_heads * n_permutations
        count = meter.permutations(cell_type, work=len(rows) * test_work, pieces=pieces)
        counters[cell_type] = count
        if outputs is not None and len(rows) <= small and access.statistics_device == "cpu":
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
    for cell_type, rows in receivers.items():
        if cell_type not in usable:
            meter.add(len(rows) * (cells_work + test_work), cell_type)
    return found


def _undefined(
    access: ModelAccess, receivers: Mapping[str, Int64[np.ndarray, " cells"]], found: Mapping[str, TypeEvaluation]
) -> list[Undefined]:
    undefined: list[Undefined] = []
    for cell_type, rows in receivers.items():
        n_cells = len(rows)
        if cell_type not in found:
            reason = f"{n_cells} cell; explained variance needs at least {MIN_CELLS_EXPLAINED_VARIANCE}"
            undefined.append(Undefined(cell_type=cell_type, reason=reason))
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
    return undefined


def _tiles(
    access: LocatedAccess, usable: Mapping[str, Int64[np.ndarray, " cells"]], everyone: Int64[np.ndarray, " cells"]
) -> _Tiles:
    samples, coordinates = access.samples(everyone), access.coordinates(everyone)
    n_sections = 1 if samples is None else len(set(samples.tolist()))
    in_all = int(np.clip(len(everyone) // (len(usable) * _CELLS_PER_TILE), _FEWEST_TILES, _MOST_TILES))
    n_tiles = max(1, in_all // n_sections)
    numbers = square_tiles(coordinates, n_tiles=n_tiles, samples=samples)
    centers = np.stack([np.bincount(numbers, weights=column) for column in coordinates[:, :2].T], axis=1)
    training = access.card.training_cells  # type: ignore[attr-defined]
    held_out = None
    if training is not None:
        names = access.cell_names(everyone)  # type: ignore[attr-defined]
        held_out = ~np.fromiter((name in training for name in names), dtype=bool, count=len(everyone))
    return _Tiles(
        numbers=tile_numbers(numbers, held_out),
        centers=centers / np.bincount(numbers)[:, None],
        width=tile_side(coordinates, n_tiles=n_tiles, samples=samples),
    )


def _fitted_names(access: FactorAccess, usable: Mapping[str, Int64[np.ndarray, " cells"]]) -> frozenset[str] | None:
    """Return the names of the training cells; ``None`` also for a new tissue, where no evaluated type has any."""
    training, cell_types = access.card.training_cells, access.card.cell_types
    if training is None:
        return None
    own = np.isin(access.label_codes, [cell_types.index(cell_type) for cell_type in usable])
    return None if training.isdisjoint(access.cell_names(np.flatnonzero(own))) else training


def _without_nearest(
    access: FactorAccess,
    receivers: Mapping[str, Int64[np.ndarray, " cells"]],
    usable: Mapping[str, Int64[np.ndarray, " cells"]],
    outputs: Float32[np.ndarray, "cells outputs"],
) -> WithoutNearest:
    ends = np.cumsum([len(rows) for rows in usable.values()])
    by_type = dict(zip(usable, np.split(outputs, ends[:-1]), strict=True))
    return explained_without_nearest(access, receivers, by_type)


def _moments(
    access: FactorAccess,
    receivers: Mapping[str, np.ndarray],
    usable: Mapping[str, np.ndarray],
    evaluated: Sequence[TypeEvaluation | None],
    outputs: np.ndarray,
    tiles: _Tiles,
) -> Moments:
    types = tuple(receivers)
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

    n_rows = sum(len(part.tiles) for _, part in parts)
    return Moments(
        cell_types=types,
        genes=access.card.genes,
        n_heads=access.card.n_heads,
        row_type=np.concatenate([np.full(len(part.tiles), index, dtype=np.int64) for index, part in parts]),
        row_tile=joined("tiles") // 2,
        row_held_out=joined("tiles") % 2 if access.card.training_cells is not None else np.full(n_rows, -1),
        n_cells=joined("n_cells"),
        target_mean=joined("target_mean").astype(np.float32),
        target_m2=joined("target_m2").astype(np.float32),
        residual_mean=joined("residual_mean").astype(np.float32),
        residual_m2=joined("residual_m2").astype(np.float32),
        full_mean=joined("full_mean").astype(np.float32),
        full_m2=joined("full_m2").astype(np.float32),
        sketch_type=np.concatenate(sketch_type),
        sketch_names=tuple(access.cell_names(np.concatenate(sketch_rows))),
        sketch_outputs=outputs[np.concatenate(sketch_places)],
        tile_center=tiles.centers,
        query_weights=np.stack([readout.weights[:, 0] for readout in readouts]).astype(np.float32),
        head_weights=readouts[0].weights[:, 1:].astype(np.float32),
        query_gram=np.stack([readout.gram[0] for readout in readouts]),
        head_gram=readouts[0].gram[1:, 1:],
        readout_offset=np.stack([readout.offset for readout in readouts]),
        readout_epsilon=np.array([readouts[0].epsilon]),
    )
