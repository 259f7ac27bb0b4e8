"""The evaluation of one receiver type as a task that can be done here or in another process."""

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

__all__ = ["Launcher", "Plan", "TypeSettings", "TypeTask", "evaluate_here", "evaluate_task"]

_SIDE_BY_SIDE_CELLS = 4096
"""Types of at most so many cells are tested several at a time, on one thread each: their arrays are small."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TypeTask:
    """What belongs to the cells of one type, besides model and expression.

    Parameters
    ----------
    cell_type
        Its name.
    rows
        Its evaluated cells, in canonical order.
    keys
        Tile of each, see :class:`~amici_eval.evaluation.tiles.Tiling`.
    outputs
        What attention brings to each; ``None``: the hooked engine makes predictions instead.
    without_nearest
        The same without the nearest neighbour, if that was asked for.
    coordinates
        Where they lie, if that is known and a test needs it.
    samples
        Section of each, if a sample column was named.
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
    """What all types share: the test, the number of permutations, and how heads are taken away."""

    test: PermutationSpec
    n_permutations: int
    modes: tuple[str, ...]


class Launcher(Protocol):
    """Evaluates types somewhere else, with the numbers that :func:`evaluate_task` gives here on one thread."""

    def prepare(self, n_tasks: int) -> None:
        """Get workers ready for so many types, while this process does what spans types."""
        ...

    def run(
        self, access: ModelAccess, tasks: Sequence[TypeTask], settings: TypeSettings, *, heartbeat: Callable[[], None]
    ) -> Iterator[tuple[str, TypeEvaluation]]:
        """Yield the evaluation of each type as it comes; ``heartbeat`` is called now and then, and may raise."""
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

    Notes
    -----
    Permutations are seeded by the name of the type, and nothing here sees another type: so the numbers do not depend on
    what else is evaluated, nor on where.
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
    """Which types are evaluated one by one, and which side by side on one thread each.

    Parameters
    ----------
    together
        Names of those that are evaluated side by side.

    Notes
    -----
    It is made for all types, also where some are finished already: on how many threads a type is evaluated may change
    its numbers by rounding.
    """

    together: frozenset[str]

    @classmethod
    def of(cls, access: ModelAccess, tasks: Sequence[TypeTask]) -> Plan:
        """Make the plan for all types of an evaluation."""
        # a type with most of the cells would keep one thread busy while the others wait
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
    """Yield the evaluation of each type as it comes: large ones one by one, and small ones side by side."""
    n_threads, turn = torch.get_num_threads(), Lock()

    def evaluate_one(task: TypeTask, on_permutations: Callable[[int], None]) -> TypeEvaluation:
        large = len(task.rows) > _SIDE_BY_SIDE_CELLS
        return evaluate_task(
            access,
            task,
            settings,
            on_cells=on_cells[task.cell_type],
            on_permutations=on_permutations,
            # the rows of a large type fill the cache, so that two such tests would be in each other's way; the
            # transforms of the cyclic one are done in a moment
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
