"""How far an evaluation is: work of different kinds added up and told to a callback."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Meter", "Progress"]

Progress = Callable[[int, int, str], None]
"""Called with (work done, work in all, what is being done); work counts cells, times what each has to go through."""


class Meter:
    """Adds up work and tells how far it is.

    Parameters
    ----------
    progress
        Who is told; ``None``: nobody.
    total
        All the work there will be.
    """

    def __init__(self, progress: Progress | None, *, total: float) -> None:
        self._progress, self._total, self._done = progress, max(1, round(total)), 0.0

    def add(self, work: float, what: str) -> None:
        """Count finished work."""
        self._done += work
        if self._progress is not None:
            self._progress(min(self._total, round(self._done)), self._total, what)

    def cells(self, what: str, n_cells: int) -> Callable[[int], None]:
        """Return a callback that counts finished cells."""
        finished = 0

        def advance(more: int) -> None:
            nonlocal finished
            finished += more
            self.add(more, f"{what}: {finished:,} of {n_cells:,} cells")

        return advance

    def permutations(self, cell_type: str, *, work: float, pieces: int) -> PermutationMeter:
        """Return what counts finished (head, permutation) pairs, which together are ``work``."""
        return PermutationMeter(self, cell_type, work=work, pieces=pieces)


class PermutationMeter:
    """Counts the (head, permutation) pairs of one type; see :meth:`Meter.permutations`."""

    def __init__(self, meter: Meter, cell_type: str, *, work: float, pieces: int) -> None:
        self._meter, self._cell_type, self._work, self._pieces = meter, cell_type, work, pieces
        self._finished = 0

    def __call__(self, more: int) -> None:
        """Count finished pairs."""
        before = self._finished
        self._finished = min(self._pieces, before + more)
        share = 100 * self._finished // self._pieces
        work = self._work * (self._finished - before) / self._pieces
        self._meter.add(work, f"{self._cell_type}: {share} % of permutations")

    def finish(self) -> None:
        """Count what is left: a test may end early, or there may be none."""
        self._meter.add(self._work * (self._pieces - self._finished) / self._pieces, self._cell_type)
        self._finished = self._pieces
