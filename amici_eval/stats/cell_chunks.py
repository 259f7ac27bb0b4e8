"""Work on the cells of a type chunk by chunk: a torch task for each thread, and tensors of what it reads."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from amici_eval.common.memory import Shrinking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from jaxtyping import Float, Float32, Int, Int64

    from amici_eval.stats.type_sums import Block

CHUNK_CELLS = 512
"""Cells that a thread works on at a time: about 8 MB of working memory at 8 heads of 32 numbers."""

_MIN_CELLS_PER_THREAD = 128
_LEAST_CHUNK = 8
_BLOCK_ROWS = 8192
"""Most rows of a block of expression."""

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class _BlockRows:
    """Some rows of a block."""

    positions: Int64[np.ndarray, " rows"]
    values: Float32[np.ndarray, "rows genes"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread, for products too small to be worth waiting for another."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def in_chunks(work: Callable[[int], Result], chunk_cells: int, *, what: str, device: str) -> Result:
    """Run ``work`` with ``chunk_cells`` cells at a time, or with half as many for as long as memory runs out.

    Sums over cells are then added in another order, which changes the last bits.
    """
    return Shrinking(chunk_cells, floor=min(_LEAST_CHUNK, chunk_cells), what=what, device=device).run(work)


def over_blocks(
    work: Callable[[Iterable[Block]], Result], read: Callable[[], Iterable[Block]], *, what: str, device: str
) -> Result:
    """Run ``work`` on one reading of the cells, and anew with smaller blocks where memory runs out.

    ``read`` begins a reading; ``work`` must leave nothing behind if it fails.
    """

    def parts(n_rows: int) -> Iterator[Block]:
        for block in read():
            if len(block.positions) <= n_rows:
                yield block
                continue
            for start in range(0, len(block.positions), n_rows):
                own = slice(start, start + n_rows)
                yield _BlockRows(positions=block.positions[own], values=block.values[own])

    rows = Shrinking(_BLOCK_ROWS, floor=_LEAST_CHUNK, what=what, device=device)
    return rows.run(lambda n_rows: work(parts(n_rows)))


def over_cells(task: Callable[[list[slice]], Result], n_cells: int, *, chunk_cells: int, device: str) -> list[Result]:
    """Return the results of ``task`` on shares of consecutive slices of cells, one call for each thread of torch.

    If there are several calls, torch computes on one thread in each: threads that meet after every small operation wait
    for each other, long where other processes want the processors, too. Slices are at most ``chunk_cells`` long and
    cover all cells.
    """
    n_torch = torch.get_num_threads()
    n_threads = max(1, min(n_torch, n_cells // _MIN_CELLS_PER_THREAD)) if torch.device(device).type == "cpu" else 1
    n_chunks = n_threads * math.ceil(n_cells / (chunk_cells * n_threads))
    step = math.ceil(n_cells / n_chunks)
    chunks = [slice(start, min(start + step, n_cells)) for start in range(0, n_cells, step)]
    if n_threads == 1:
        return [task(chunks)]
    inference = torch.is_inference_mode_enabled()

    def alone(share: list[slice]) -> Result:
        torch.set_num_threads(1)
        with torch.inference_mode(inference):
            return task(share)

    try:
        with ThreadPoolExecutor(n_threads) as pool:
            return list(pool.map(alone, [chunks[first::n_threads] for first in range(n_threads)]))
    finally:
        torch.set_num_threads(n_torch)  # torch makes a thread's setting the default of later threads


def to_tensor(array: Float[np.ndarray, ...] | Int[np.ndarray, ...], device: str) -> torch.Tensor:
    """Return a tensor of the same numbers, on the CPU over the same memory if that can be written to."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)


def to_float64(array: Float[np.ndarray, ...], device: str) -> torch.Tensor:
    """Return a float64 copy as a tensor."""
    return torch.tensor(array, dtype=torch.float64, device=device)
