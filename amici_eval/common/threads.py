"""Whether compiled kernels are there (numba is optional, and loading it takes a moment), and threads to run them in."""

from __future__ import annotations

import importlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import TYPE_CHECKING, TypeVar

from amici_eval.common.compiling import numba_if_usable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future
    from types import ModuleType

Result = TypeVar("Result")

__all__ = ["cuts", "in_threads", "kernels"]

_WAITING_PER_THREAD = 8


def kernels() -> ModuleType | None:
    """Return the module of compiled kernels, or ``None`` without numba or with its compiler switched off."""
    return None if numba_if_usable() is None else importlib.import_module("amici_eval.stats.permutation.kernels")


def cuts(length: int, n_parts: int, *, multiple: int = 1) -> list[tuple[int, int]]:
    """Cut 0 to ``length`` into at most ``n_parts`` ranges that begin at multiples of ``multiple``."""
    step = max(1, -(-length // (n_parts * multiple))) * multiple
    return [(first, min(first + step, length)) for first in range(0, length, step)]


def in_threads(tasks: Iterable[Callable[[], Result]], n_threads: int, done: Callable[[Result], object]) -> None:
    """Run tasks that leave the interpreter alone; hand each result on in order, in the calling thread.

    Tasks are taken as they are needed. An error or an interrupt waits for what is running; the rest does not begin.
    """
    tasks = iter(tasks)
    begin = list(islice(tasks, 2))
    if n_threads == 1 or len(begin) < 2:
        for task in chain(begin, tasks):
            done(task())
        return
    pool = ThreadPoolExecutor(n_threads)
    waiting: deque[Future[Result]] = deque()
    try:
        for task in chain(begin, tasks):
            waiting.append(pool.submit(task))
            if len(waiting) == _WAITING_PER_THREAD * n_threads:
                done(waiting.popleft().result())
        while waiting:
            done(waiting.popleft().result())
    finally:
        pool.shutdown(cancel_futures=True)
