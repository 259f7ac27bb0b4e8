"""The evaluation of all receiver types, and of what needs all types together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.evaluation.baselines import evaluate_baselines
from amici_eval.evaluation.protocols import FactorAccess, LocatedAccess, Meter, PermutationMeter, Progress, TissueAccess
from amici_eval.evaluation.senders import WHY_NOT, evaluate_senders
from amici_eval.evaluation.tasks import Plan, TypeSettings, TypeTask, evaluate_here
from amici_eval.evaluation.tiles import Sketch, Tiling, kept_moments, tile_of
from amici_eval.results.evaluation import Undefined
from amici_eval.stats.explained_variance import MIN_CELLS_EXPLAINED_VARIANCE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Bool, Int64

    from amici_eval.evaluation.finished_parts import FinishedParts
    from amici_eval.evaluation.one_type import TypeEvaluation
    from amici_eval.evaluation.tasks import Launcher
    from amici_eval.model.engines.factored import HeadOutputs
    from amici_eval.model.engines.hooked import ModelAccess
    from amici_eval.results.analyses import Baselines, Senders
    from amici_eval.results.tile_sums import Moments
    from amici_eval.settings.evaluation import EvaluationSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class Types:
    """Results of the evaluation of all types.

    ``evaluated`` is in the order of the receivers, None for a type with too few cells. ``moments`` and ``senders`` are
    from the factored engine; ``baselines`` and ``tile_width`` (coordinate units) need known positions. ``held_out``: by
    type, whether the model was fitted on none of its evaluated cells, None if unknown.
    """

    evaluated: list[TypeEvaluation | None]
    undefined: list[Undefined]
    moments: Moments | None = None
    baselines: Baselines | None = None
    senders: Senders | None = None
    tile_width: float | None = None
    held_out: tuple[bool | None, ...] = ()
    notes: tuple[str, ...] = ()


def evaluate_types(
    access: ModelAccess,
    receivers: Mapping[str, Int64[np.ndarray, " cells"]],
    spec: EvaluationSpec,
    *,
    n_permutations: int,
    modes: tuple[str, ...],
    progress: Progress | None,
    launcher: Launcher | None = None,
    parts: FinishedParts | None = None,
) -> Types:
    """Evaluate all types."""
    usable = {cell_type: rows for cell_type, rows in receivers.items() if len(rows) >= MIN_CELLS_EXPLAINED_VARIANCE}
    everyone = np.concatenate([*usable.values(), np.zeros(0, dtype=np.int64)]).astype(np.int64)
    n_heads, n_receivers = access.card.n_heads, sum(len(rows) for rows in receivers.values())
    factors = access if isinstance(access, FactorAccess) and len(everyone) else None
    engine = "hooked" if factors is None else "factored"
    there = {name: part for name in usable if (part := _taken(parts, _type_part(engine, name))) is not None}
    if launcher is not None and len(there) < len(usable):
        launcher.prepare(len(usable) - len(there))
    # rough costs relative to one cell's forward pass
    cells_work = 1.0 if factors is not None else n_heads + 2.0 + (n_heads if "leave_one_out" in modes else 0)
    test_work = n_permutations / 1000 if factors is not None else float(n_heads)
    tissue = access if isinstance(access, TissueAccess) else None
    with_baselines = spec.ablation.baselines and tissue is not None
    batches: list[tuple[int, ...]] = []
    if spec.ablation.senders and factors is not None:
        batches = factors.sender_batches(len(everyone))
    # each mask takes another pass over all receivers and their expression
    mask_work = len(everyone) * sum(map(len, batches))
    meter = Meter(progress, total=n_receivers * (cells_work + test_work + with_baselines) + mask_work)
    sketch = Sketch.of(usable)
    senders: Senders | None = _taken(parts, _SENDERS) if batches else None
    # stored outputs lack the masked ones that senders need
    outputs: HeadOutputs | None = None if batches and senders is None else _taken(parts, _ATTENTION)
    if outputs is not None:
        meter.add(len(everyone), "attention")
    elif factors is not None:
        outputs = factors.attend(
            everyone,
            without_senders=batches[0] if batches and senders is None else (),
            without_nearest=spec.ablation.baselines and spec.ablation.without_nearest,
            attention_of=sketch.places[sketch.attended],
            progress=meter.cells("attention", len(everyone)),
        )
        if not batches or senders is not None:
            _keep(parts, _ATTENTION, outputs)
    all_fitted = access.fitted
    fitted = None if all_fitted is None else all_fitted[everyone]
    tiling = None
    if isinstance(access, LocatedAccess) and len(everyone):
        tiling = Tiling.of(access, everyone, fitted=fitted, n_types=len(usable))
    if senders is not None:
        meter.add(mask_work, "senders masked out")
    elif batches and factors is not None and outputs is not None and tiling is not None:
        senders = evaluate_senders(
            factors,
            receivers,
            usable,
            outputs,
            batches,
            tile_of(tiling.keys),
            n_tiles=len(tiling.centers),
            test=spec.permutation,
            progress=lambda more: meter.add(more, "senders masked out"),
        )
        # free the array of each sender type before types are tested
        outputs = replace(outputs, without_senders=None, by_sender=None)
        _keep(parts, _SENDERS, senders)
        _keep(parts, _ATTENTION, outputs)
    outputs, ties = _without_ties(outputs, usable)
    found = _each(
        access,
        receivers,
        usable,
        spec,
        n_permutations=n_permutations,
        modes=modes,
        outputs=outputs,
        keys=np.zeros(len(everyone), dtype=np.int64) if tiling is None else tiling.keys,
        meter=meter,
        cells_work=cells_work,
        test_work=test_work,
        launcher=launcher,
        parts=parts,
        there=there,
    )
    evaluated = [found.get(cell_type) for cell_type in receivers]
    moments = baselines = None
    if factors is not None and outputs is not None and tiling is not None:
        moments = kept_moments(factors, receivers, everyone, evaluated, outputs, sketch, tiling, senders)
    if with_baselines and tissue is not None:
        baselines = _taken(parts, _BASELINES)
    if with_baselines and tissue is not None and baselines is None:
        baselines = evaluate_baselines(
            tissue,
            receivers,
            expl_var=np.stack([np.full(n_heads, np.nan) if i is None else i.expl_var for i in evaluated], axis=1),
            expl_var_full=np.array([np.nan if item is None else item.full for item in evaluated]),
            fitted=all_fitted,
            without_nearest=np.stack(
                [
                    np.full(n_heads + 1, np.nan)
                    if item is None or item.moments is None
                    else item.moments.explained_without_nearest
                    for item in evaluated
                ],
                axis=1,
            ),
            progress=meter.cells("baselines", n_receivers),
        )
        _keep(parts, _BASELINES, baselines)
    return Types(
        evaluated=evaluated,
        undefined=_undefined(access, receivers, found),
        moments=moments,
        baselines=baselines,
        senders=senders,
        tile_width=None if tiling is None else tiling.width,
        held_out=tuple(None if all_fitted is None else not all_fitted[rows].any() for rows in receivers.values()),
        notes=(
            *(() if tissue is None or all_fitted is None else _crowded(tissue, everyone, all_fitted, spec)),
            *ties,
            *((WHY_NOT,) if spec.ablation.senders and senders is None else ()),
        ),
    )


def _each(
    access: ModelAccess,
    receivers: Mapping[str, Int64[np.ndarray, " cells"]],
    usable: Mapping[str, Int64[np.ndarray, " cells"]],
    spec: EvaluationSpec,
    *,
    n_permutations: int,
    modes: tuple[str, ...],
    outputs: HeadOutputs | None,
    keys: Int64[np.ndarray, " cells"],
    meter: Meter,
    cells_work: float,
    test_work: float,
    launcher: Launcher | None,
    parts: FinishedParts | None,
    there: Mapping[str, TypeEvaluation],
) -> dict[str, TypeEvaluation]:
    tasks = _tasks(access, usable, spec, outputs=outputs, keys=keys)
    open_tasks = [task for task in tasks if task.cell_type not in there]
    settings = TypeSettings(test=spec.permutation, n_permutations=n_permutations, modes=modes)
    counters: dict[str, PermutationMeter] = {}
    for cell_type, rows in usable.items():
        pieces = access.card.n_heads * n_permutations
        counters[cell_type] = meter.permutations(cell_type, work=len(rows) * test_work, pieces=pieces)
    found: dict[str, TypeEvaluation] = dict(there)
    for cell_type in there:
        meter.add(0 if outputs is not None else len(usable[cell_type]) * cells_work, cell_type)
        counters[cell_type].finish()
    if launcher is None:
        on_cells = {
            cell_type: meter.cells(cell_type, round(len(rows) * cells_work)) for cell_type, rows in usable.items()
        }
        plan = Plan.of(access, tasks)
        results = evaluate_here(access, open_tasks, settings, plan=plan, counters=counters, on_cells=on_cells)
    elif open_tasks:
        results = launcher.run(
            access, open_tasks, settings, heartbeat=lambda: meter.add(0, f"{len(found)} of {len(usable)} types")
        )
    else:
        results = iter(())
    for cell_type, result in results:
        found[cell_type] = result
        _keep(parts, _type_part("hooked" if outputs is None else "factored", cell_type), result)
        if launcher is not None and outputs is None:
            meter.add(len(usable[cell_type]) * cells_work, cell_type)
        counters[cell_type].finish()
    for cell_type, rows in receivers.items():
        if cell_type not in usable:
            meter.add(len(rows) * (cells_work + test_work), cell_type)
    return found


_MOST_TIED, _TIED_SAID = 0.05, 0.001
"""Share of tied cells above which a type gets no value, and share of all cells from which a note is made."""
_ATTENTION, _SENDERS, _BASELINES = "attention", "senders", "baselines"


def _type_part(engine: str, cell_type: str) -> str:
    return f"{engine} type {cell_type}"


def _taken(parts: FinishedParts | None, name: str) -> Any:
    return None if parts is None else parts.get(name)


def _keep(parts: FinishedParts | None, name: str, value: object) -> None:
    if parts is not None:
        parts.put(name, value)


def _tasks(
    access: ModelAccess,
    usable: Mapping[str, Int64[np.ndarray, " cells"]],
    spec: EvaluationSpec,
    *,
    outputs: HeadOutputs | None,
    keys: Int64[np.ndarray, " cells"],
) -> list[TypeTask]:
    """Return the task of each type; arrays are views where possible."""
    located = access if isinstance(access, LocatedAccess) and spec.permutation.spatial_null != "none" else None
    return [
        TypeTask(
            cell_type=cell_type,
            rows=rows,
            keys=keys[own],
            outputs=None if outputs is None else outputs.whole[own],
            without_nearest=None
            if outputs is None or outputs.without_nearest is None
            else outputs.without_nearest[own],
            coordinates=None if located is None else located.coordinates(rows),
            samples=None if located is None else located.samples(rows),
        )
        for own, (cell_type, rows) in zip(_slices(usable), usable.items(), strict=True)
    ]


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


def _crowded(
    access: TissueAccess,
    rows: Int64[np.ndarray, " cells"],
    fitted: Bool[np.ndarray, " all_cells"],
    spec: EvaluationSpec,
) -> tuple[str, ...]:
    """Return a note on held-out cells with training cells among their neighbours, which are less new than they seem."""
    held_out = rows[~fitted[rows]]
    near = int(fitted[access.neighbour_rows[held_out]].any(axis=1).sum())
    if not near or spec.data.subset.buffer:
        return ()
    said = f"{near} of {len(held_out)} held-out cells have cells that the model was fitted on among their neighbours, "
    if near == len(held_out):
        said += "as after any random split; a region or section that was held out as a whole says more"
    else:
        said += "as AMICI's validation cells have; data.subset.buffer=true evaluates the others alone, which say more"
    return (said,)


def _without_ties(
    outputs: HeadOutputs | None, usable: Mapping[str, Int64[np.ndarray, " cells"]]
) -> tuple[HeadOutputs | None, tuple[str, ...]]:
    """Replace ``without_nearest`` of tied receivers by ``whole``, and of types with many ties by NaN; return notes."""
    if outputs is None or outputs.without_nearest is None:
        return outputs, ()
    tied = np.isnan(outputs.without_nearest[:, 0]) & ~np.isnan(outputs.whole[:, 0])
    if not tied.any():
        return outputs, ()
    masked = np.where(tied[:, None], outputs.whole, outputs.without_nearest)
    left_out = []
    for own, cell_type in zip(_slices(usable), usable, strict=True):
        if tied[own].mean() > _MOST_TIED:
            left_out.append(cell_type)
            masked[own] = np.nan
    types = (
        f"is left out of types with more than {_MOST_TIED:.0%} of such cells ({', '.join(left_out)}), and elsewhere "
    )
    note = (
        f"{tied.sum()} of {len(tied)} evaluated cells have several neighbours at the least distance, so that none is "
        f"the nearest: explained variance without the nearest neighbour {types if left_out else ''}leaves them all "
        "their neighbours"
    )
    return replace(outputs, without_nearest=masked), (note,) if tied.mean() >= _TIED_SAID else ()


def _slices(usable: Mapping[str, Int64[np.ndarray, " cells"]]) -> list[slice]:
    """Return the slice of each type's cells among the cells of all types, one type after the other."""
    ends = np.cumsum([0, *(len(rows) for rows in usable.values())]).tolist()
    return [slice(start, stop) for start, stop in pairwise(ends)]
