"""The evaluation of all receiver types, and of what needs all types together; finished parts are kept in a folder."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.files import PARTIAL_SUFFIX, DamagedPackError, read_pack, write_durably, write_pack
from amici_eval.evaluation.baselines import evaluate_baselines
from amici_eval.evaluation.head_tests import FreeTest, TypeSpatial
from amici_eval.evaluation.launching import evaluate_here, side_by_side_types
from amici_eval.evaluation.one_type import TypeEvaluation, TypeTask
from amici_eval.evaluation.protocols import FactorAccess, LocatedAccess, Meter, Progress, TissueAccess
from amici_eval.evaluation.senders import WHY_NOT, evaluate_senders
from amici_eval.evaluation.tiles import EvaluatedCells, kept_moments
from amici_eval.model.engines.factored import HeadOutputs
from amici_eval.results.analyses import Baselines, Senders
from amici_eval.results.evaluation import Undefined
from amici_eval.stats.ablation.ablations import TypeAblations
from amici_eval.stats.explained_variance import MIN_CELLS_EXPLAINED_VARIANCE, TileSums
from amici_eval.stats.type_sums import TypeSums

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jaxtyping import Bool, Int64

    from amici_eval.evaluation.launching import Launcher
    from amici_eval.evaluation.one_type import TypeSettings
    from amici_eval.model.engines.hooked import ModelAccess
    from amici_eval.results.moments import Moments
    from amici_eval.settings.evaluation import EvaluationSpec

logger = logging.getLogger(__name__)

_CLASSES = (TypeEvaluation, FreeTest, TypeSpatial, TypeAblations, TypeSums, TileSums, HeadOutputs, Senders, Baselines)
_SUFFIX = ".part"


class FinishedParts:
    """Finished parts of one evaluation, by name.

    ``key`` says what was evaluated, on what and how; parts with another key are not used. ``others`` are folders of the
    same evaluation that other processes left or still use. Parts are written atomically and read back bit for bit;
    damaged ones are computed again. A folder that cannot be written to is a warning: the work goes on without it.
    """

    def __init__(self, folder: Path, *, key: str, others: Sequence[Path] = ()) -> None:
        self._folder, self._key, self._others = folder, key, tuple(others)
        self._full = False
        self.taken: list[str] = []
        """Names of the parts that were found, in the order of the requests."""
        self.kept: list[str] = []
        """Names of the parts that were written."""

    @property
    def n_types(self) -> int:
        """Number of cell types that were found or written."""
        return sum(1 for name in {*self.taken, *self.kept} if name.startswith(("factored type ", "hooked type ")))

    @staticmethod
    def count_in(folder: Path) -> int:
        """Return the number of parts in a folder."""
        return sum(1 for _ in folder.glob(f"*{_SUFFIX}"))

    def get(self, name: str) -> Any:
        """Return a part, or ``None`` if it is not there or damaged."""
        for folder in (self._folder, *self._others):
            path = folder / _file_name(name)
            try:
                found = read_pack(path, label={"name": name, "key": self._key}, classes=_CLASSES)
            except FileNotFoundError:
                continue
            except DamagedPackError as error:
                logger.warning("%s (%s) is damaged and is computed again: %s", path, name, error)
                continue
            self.taken.append(name)
            return found
        return None

    def put(self, name: str, value: Any) -> None:
        """Write a part."""
        if self._full:
            return
        path = self._folder / _file_name(name)
        try:
            if not self._folder.is_dir():
                self._folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, lambda partial: write_pack(partial, value, label={"name": name, "key": self._key}))
        except OSError as error:
            # warn once, not for each part
            self._full = True
            logger.warning(
                "results cannot be kept in %s as they finish (%s); the work goes on, an interruption would lose them",
                self._folder,
                error.strerror or error,
            )
            return
        self.kept.append(name)

    def sweep(self) -> None:
        """Remove partial files of writers that were killed."""
        for path in self._folder.glob(f"*{PARTIAL_SUFFIX}"):
            path.unlink(missing_ok=True)


def _file_name(name: str) -> str:
    # hashed because names of types may not be valid file names
    return hashlib.sha256(name.encode()).hexdigest()[:32] + _SUFFIX


@dataclass(frozen=True, kw_only=True, eq=False)
class Types:
    """Results of the evaluation of all types.

    ``evaluated`` is in the order of the receivers, None for a type with too few cells. ``moments`` and ``senders``
    are from the factored engine; ``trivial`` (predictors without heads) and ``tile_width`` (coordinate units) need
    known positions. ``held_out``: by type, whether the model was fitted on none of its evaluated cells, None if
    unknown.
    """

    evaluated: list[TypeEvaluation | None]
    undefined: list[Undefined]
    moments: Moments | None = None
    trivial: Baselines | None = None
    senders: Senders | None = None
    tile_width: float | None = None
    held_out: tuple[bool | None, ...] = ()
    notes: tuple[str, ...] = ()


_MOST_TIED, _TIED_SAID = 0.05, 0.001
"""Share of tied cells above which a type gets no value, and share of all cells from which a note is made."""
_ATTENTION, _SENDERS, _BASELINES = "attention", "senders", "baselines"


def evaluate_types(
    access: ModelAccess,
    receivers: Mapping[str, Int64[np.ndarray, " cells"]],
    spec: EvaluationSpec,
    settings: TypeSettings,
    *,
    progress: Progress | None,
    launcher: Launcher | None = None,
    parts: FinishedParts | None = None,
) -> Types:
    """Evaluate all types: attention of all cells, senders, each type by itself, then predictors without heads."""
    cells = EvaluatedCells.of(access, receivers)
    factors = access if isinstance(access, FactorAccess) and len(cells.rows) else None
    tissue = access if isinstance(access, TissueAccess) else None
    engine = "hooked" if factors is None else "factored"
    finished = {name: part for name in cells.usable if (part := _taken(parts, f"{engine} type {name}")) is not None}
    if launcher is not None and len(finished) < len(cells.usable):
        launcher.prepare(len(cells.usable) - len(finished))
    batches = factors.sender_batches(len(cells.rows)) if factors is not None and spec.ablation.senders else []
    work = _Work.of(access, spec, settings, cells, batches, engine)
    run = _Run(
        cells=cells, spec=spec, settings=settings, work=work, meter=Meter(progress, total=work.total), parts=parts
    )
    outputs = senders = None
    if factors is not None:
        outputs, senders = run.attention_and_senders(factors, batches)
    outputs, ties = _without_ties(outputs, cells.slices)
    found = run.each_type(access, outputs, finished, launcher)
    evaluated = [found.get(cell_type) for cell_type in receivers]
    all_fitted = access.fitted
    return Types(
        evaluated=evaluated,
        undefined=_undefined(access, receivers, found),
        moments=None
        if factors is None or outputs is None
        else kept_moments(factors, cells, evaluated, outputs, senders),
        trivial=run.trivial(tissue, evaluated) if tissue is not None and spec.ablation.baselines else None,
        senders=senders,
        tile_width=None if cells.tiling is None else cells.tiling.width,
        held_out=tuple(None if all_fitted is None else not all_fitted[rows].any() for rows in receivers.values()),
        notes=(
            *(() if tissue is None or all_fitted is None else _crowded(tissue, cells.rows, all_fitted, spec)),
            *ties,
            *((WHY_NOT,) if spec.ablation.senders and senders is None else ()),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Rough costs, of which 1 is one cell's forward pass: per cell, of all sender masks, and in total."""

    predictions: float
    tests: float
    masks: int
    total: float

    @classmethod
    def of(
        cls,
        access: ModelAccess,
        spec: EvaluationSpec,
        settings: TypeSettings,
        cells: EvaluatedCells,
        batches: Sequence[tuple[int, ...]],
        engine: str,
    ) -> _Work:
        n_heads = access.card.n_heads
        predictions, tests = 1.0, settings.n_permutations / 1000
        if engine == "hooked":
            predictions = n_heads + 2.0 + (n_heads if "leave_one_out" in settings.modes else 0)
            tests = float(n_heads)
        # each mask takes another pass over all receivers and their expression
        masks = len(cells.rows) * sum(map(len, batches))
        with_baselines = spec.ablation.baselines and isinstance(access, TissueAccess)
        total = cells.n_receivers * (predictions + tests + with_baselines) + masks
        return cls(predictions=predictions, tests=tests, masks=masks, total=total)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _Run:
    """The steps of one evaluation, each of which counts its work and keeps what it has finished."""

    cells: EvaluatedCells
    spec: EvaluationSpec
    settings: TypeSettings
    work: _Work
    meter: Meter
    parts: FinishedParts | None

    def attention_and_senders(
        self, access: FactorAccess, batches: Sequence[tuple[int, ...]]
    ) -> tuple[HeadOutputs, Senders | None]:
        """Return the attention outputs of all cells, and the effects of masking each type of sender if asked for."""
        rows, ablation = self.cells.rows, self.spec.ablation
        senders: Senders | None = _taken(self.parts, _SENDERS) if batches else None
        open_batches = batches if senders is None else ()
        # stored outputs lack the masked ones that senders need
        outputs: HeadOutputs | None = None if open_batches else _taken(self.parts, _ATTENTION)
        if outputs is not None:
            self.meter.add(len(rows), "attention")
        else:
            outputs = access.attend(
                rows,
                without_senders=open_batches[0] if open_batches else (),
                without_nearest=ablation.baselines and ablation.without_nearest,
                attention_of=self.cells.sketch.places[self.cells.sketch.attended],
                progress=self.meter.cells("attention", len(rows)),
            )
            if not open_batches:
                _keep(self.parts, _ATTENTION, outputs)
        if senders is not None:
            self.meter.add(self.work.masks, "senders masked out")
        elif open_batches:
            senders = evaluate_senders(
                access,
                self.cells,
                outputs,
                open_batches,
                test=self.spec.permutation,
                progress=lambda more: self.meter.add(more, "senders masked out"),
            )
            # free the array of each sender type before types are tested
            outputs = replace(outputs, without_senders=None, by_sender=None)
            _keep(self.parts, _SENDERS, senders)
            _keep(self.parts, _ATTENTION, outputs)
        return outputs, senders

    def each_type(
        self,
        access: ModelAccess,
        outputs: HeadOutputs | None,
        finished: Mapping[str, TypeEvaluation],
        launcher: Launcher | None,
    ) -> dict[str, TypeEvaluation]:
        """Return the evaluation of each usable type; those that are not ``finished`` run here or at the launcher."""
        usable, meter, work = self.cells.usable, self.meter, self.work
        n_pairs = access.card.n_heads * self.settings.n_permutations
        counters = {
            cell_type: meter.permutations(cell_type, work=len(rows) * work.tests, pieces=n_pairs)
            for cell_type, rows in usable.items()
        }
        on_cells = {
            cell_type: meter.cells(cell_type, round(len(rows) * work.predictions)) for cell_type, rows in usable.items()
        }
        found = dict(finished)
        for cell_type in finished:
            # attention was counted for all types together
            meter.add(0 if outputs is not None else len(usable[cell_type]) * work.predictions, cell_type)
            counters[cell_type].finish()
        tasks = self.tasks(access, outputs)
        left = [task for task in tasks if task.cell_type not in finished]
        if launcher is None:
            together = side_by_side_types(access, tasks)
            results = evaluate_here(
                access, left, self.settings, side_by_side=together, counters=counters, on_cells=on_cells
            )
        elif left:
            results = launcher.run(
                access, left, self.settings, heartbeat=lambda: meter.add(0, f"{len(found)} of {len(usable)} types")
            )
        else:
            results = iter(())
        for cell_type, result in results:
            found[cell_type] = result
            _keep(self.parts, f"{'hooked' if outputs is None else 'factored'} type {cell_type}", result)
            if launcher is not None and outputs is None:
                meter.add(len(usable[cell_type]) * work.predictions, cell_type)
            counters[cell_type].finish()
        for cell_type, rows in self.cells.receivers.items():
            if cell_type not in usable:
                meter.add(len(rows) * (work.predictions + work.tests), cell_type)
        return found

    def tasks(self, access: ModelAccess, outputs: HeadOutputs | None) -> list[TypeTask]:
        """Return the task of each type; arrays are views where possible."""
        spatial_null = self.spec.permutation.spatial_null
        located = access if isinstance(access, LocatedAccess) and spatial_null != "none" else None
        tiling, tasks = self.cells.tiling, []
        without_nearest = None if outputs is None else outputs.without_nearest
        for cell_type, own in self.cells.slices.items():
            rows = self.cells.usable[cell_type]
            tasks.append(
                TypeTask(
                    cell_type=cell_type,
                    rows=rows,
                    keys=np.zeros(len(rows), dtype=np.int64) if tiling is None else tiling.keys[own],
                    z=None if outputs is None else outputs.whole[own],
                    z_without_nearest=None if without_nearest is None else without_nearest[own],
                    coordinates=None if located is None else located.coordinates(rows),
                    samples=None if located is None else located.samples(rows),
                )
            )
        return tasks

    def trivial(self, access: TissueAccess, evaluated: Sequence[TypeEvaluation | None]) -> Baselines:
        """Return what predictors without heads explain."""
        trivial: Baselines | None = _taken(self.parts, _BASELINES)
        if trivial is not None:
            return trivial
        nothing = np.full(access.card.n_heads + 1, np.nan)
        without_nearest = [
            nothing if item is None or item.sums is None else item.sums.explained_without_nearest for item in evaluated
        ]
        trivial = evaluate_baselines(
            access,
            self.cells.receivers,
            expl_var=np.stack([nothing[1:] if item is None else item.expl_var for item in evaluated], axis=1),
            expl_var_full=np.array([np.nan if item is None else item.full for item in evaluated]),
            fitted=access.fitted,
            without_nearest=np.stack(without_nearest, axis=1),
            progress=self.meter.cells("baselines", self.cells.n_receivers),
        )
        _keep(self.parts, _BASELINES, trivial)
        return trivial


def _taken(parts: FinishedParts | None, name: str) -> Any:
    return None if parts is None else parts.get(name)


def _keep(parts: FinishedParts | None, name: str, value: object) -> None:
    if parts is not None:
        parts.put(name, value)


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
    outputs: HeadOutputs | None, slices: Mapping[str, slice]
) -> tuple[HeadOutputs | None, tuple[str, ...]]:
    """Replace ``without_nearest`` of tied receivers by ``whole``, and of types with many ties by NaN; return notes."""
    if outputs is None or outputs.without_nearest is None:
        return outputs, ()
    tied = np.isnan(outputs.without_nearest[:, 0]) & ~np.isnan(outputs.whole[:, 0])
    if not tied.any():
        return outputs, ()
    masked = np.where(tied[:, None], outputs.whole, outputs.without_nearest)
    left_out = []
    for cell_type, own in slices.items():
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
