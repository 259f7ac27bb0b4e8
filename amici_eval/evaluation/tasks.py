"""The evaluation of one receiver type as a task for this or another process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Protocol, cast

import torch

from amici_eval.common.threads import run_side_by_side
from amici_eval.evaluation.one_type import evaluate_type_by_factors, evaluate_type_by_hooks
from amici_eval.stats.spatial.lag import CellPositions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    from jaxtyping import Float32, Float64, Int64

    from amici_eval.evaluation.one_type import TypeEvaluation
    from amici_eval.evaluation.protocols import FactorAccess, ModelAccess, PermutationMeter
    from amici_eval.settings.evaluation import PermutationSpec

_SIDE_BY_SIDE_CELLS = 4096
"""Types of at most this many cells are tested several at a time, on one thread each, as their arrays are small."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TypeTask:
    """Data of the cells of one type, besides model and expression.

    ``rows``: evaluated cells in canonical order; ``keys``: tile and part of each
    (:class:`~amici_eval.evaluation.tiles.Tiling`); ``outputs``: attention outputs, None with the hooked engine;
    ``without_nearest``: the same with the nearest neighbour masked; ``coordinates`` and ``samples``: None if unknown or
    not needed.
    """

    cell_type: str
    rows: Int64[np.ndarray, " cells"]
    keys: Int64[np.ndarray, " cells"]
    outputs: Float32[np.ndarray, "cells outputs"] | None = None
    without_nearest: Float32[np.ndarray, "cells outputs"] | None = None
    coordinates: Float64[np.ndarray, "cells dimensions"] | None = None
    samples: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class TypeSettings:
    """Settings that all types share: the test, the number of permutations, and the ablation modes."""

    test: PermutationSpec
    n_permutations: int
    modes: tuple[str, ...]


class Launcher(Protocol):
    """Evaluates types elsewhere, with the same numbers as :func:`evaluate_task` gives here on one thread."""

    def prepare(self, n_tasks: int) -> None:
        """Start workers for a number of types, while this process does the work that spans types."""
        ...

    def run(
        self, access: ModelAccess, tasks: Sequence[TypeTask], settings: TypeSettings, *, heartbeat: Callable[[], None]
    ) -> Iterator[tuple[str, TypeEvaluation]]:
        """Yield the evaluation of each type as it finishes; ``heartbeat`` is called repeatedly and may raise."""
        ...


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
    """Evaluate one type.

    Permutations are seeded by the name of the type, and nothing here depends on other types, so that the numbers depend
    neither on what else is evaluated nor on where.
    """
    place = None
    if task.coordinates is not None:
        place = CellPositions.of(task.coordinates, samples=task.samples, n_genes=len(access.card.genes))
    if task.outputs is not None:
        return evaluate_type_by_factors(
            cast("FactorAccess", access),
            task.cell_type,
            task.rows,
            task.keys,
            task.outputs,
            test=settings.test,
            n_permutations=settings.n_permutations,
            modes=settings.modes,
            place=place,
            without_nearest=task.without_nearest,
            on_permutations=on_permutations,
            in_turn=in_turn,
            n_threads=n_threads,
        )
    return evaluate_type_by_hooks(
        access,
        task.cell_type,
        task.rows,
        task.keys,
        test=settings.test,
        n_permutations=settings.n_permutations,
        modes=settings.modes,
        place=place,
        on_cells=on_cells,
        on_permutations=on_permutations,
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The types that are evaluated side by side, on one thread each; the others follow one by one.

    It is made from all types, also where some are finished already: the number of threads may change a type's numbers
    by rounding.
    """

    together: frozenset[str]

    @classmethod
    def of(cls, access: ModelAccess, tasks: Sequence[TypeTask]) -> Plan:
        """Return the plan for all types of an evaluation."""
        # a type with many of the cells would run on one thread while the others idle
        small = max(_SIDE_BY_SIDE_CELLS, sum(len(task.rows) for task in tasks) // (2 * torch.get_num_threads()))
        if access.statistics_device != "cpu":
            return cls(together=frozenset())
        return cls(
            together=frozenset(task.cell_type for task in tasks if task.outputs is not None and len(task.rows) <= small)
        )


def evaluate_here(
    access: ModelAccess,
    tasks: Sequence[TypeTask],
    settings: TypeSettings,
    *,
    plan: Plan,
    counters: Mapping[str, PermutationMeter],
    on_cells: Mapping[str, Callable[[int], None]],
) -> Iterator[tuple[str, TypeEvaluation]]:
    """Yield the evaluation of each type as it finishes: large ones one by one, then small ones side by side."""
    n_threads, turn = torch.get_num_threads(), Lock()

    def evaluate_one(task: TypeTask, on_permutations: Callable[[int], None]) -> TypeEvaluation:
        large = len(task.rows) > _SIDE_BY_SIDE_CELLS
        return evaluate_task(
            access,
            task,
            settings,
            on_cells=on_cells[task.cell_type],
            on_permutations=on_permutations,
            # two tests of large types would compete for the cache; the
            # cyclic test is too short to matter
            in_turn=turn if large and settings.test.sampling != "cyclic" else None,
            n_threads=n_threads if large else None,
        )

    together: dict[str, Callable[[Callable[[int], None]], TypeEvaluation]] = {}
    for task in tasks:
        if task.cell_type in plan.together:
            together[task.cell_type] = partial(evaluate_one, task)
        else:
            yield task.cell_type, evaluate_one(task, counters[task.cell_type])
    yield from run_side_by_side(together, counters, alone=len(plan.together) <= 1)
