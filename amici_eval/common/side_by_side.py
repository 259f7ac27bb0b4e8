"""Small tasks, several at a time, each on one thread."""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import torch

from amici_eval.common.threads import in_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

Result = TypeVar("Result")

__all__ = ["run_on_single_threads", "run_side_by_side"]

_LOOK_S = 0.2


class _StoppedError(Exception):
    """Raised inside a task whose result nobody waits for."""


def run_side_by_side(
    tasks: Mapping[str, Callable[[Callable[[int], None]], Result]],
    counters: Mapping[str, Callable[[int], None]],
    *,
    alone: bool = False,
) -> Iterator[tuple[str, Result]]:
    """Run tasks, as many at a time as torch has threads, and yield each result as it comes.

    Notes
    -----
    Within a task torch computes on one thread: threads that meet after every small operation wait for each other most
    of the time.
    """
    n_threads = torch.get_num_threads()
    if n_threads <= 1 or alone:
        for name, task in tasks.items():
            yield name, task(counters[name])
        return
    told: SimpleQueue[tuple[str, int]] = SimpleQueue()
    stopped = threading.Event()

    def run(name: str) -> Result:
        def count(more: int) -> None:
            if stopped.is_set():
                raise _StoppedError
            told.put((name, more))

        torch.set_num_threads(1)
        return tasks[name](count)

    def tell() -> None:
        try:
            while True:
                name, more = told.get_nowait()
                counters[name](more)
        except Empty:
            return

    pool = ThreadPoolExecutor(max(1, min(n_threads, len(tasks))))
    try:
        running = {pool.submit(run, name): name for name in tasks}
        while running:
            finished, _ = wait(running, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
            tell()
            for future in finished:
                yield running.pop(future), future.result()
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
        # what a thread sets for itself, torch takes as default for later threads
        torch.set_num_threads(n_threads)


def run_on_single_threads(tasks: Iterable[Callable[[], None]], *, n_threads: int) -> None:
    """Run tasks, several at a time, each with torch on one thread; they are taken as they are needed."""
    if n_threads <= 1:
        for task in tasks:
            task()
        return
    before = torch.get_num_threads()

    def alone(task: Callable[[], None]) -> None:
        torch.set_num_threads(1)
        task()

    try:
        in_threads((partial(alone, task) for task in tasks), n_threads, lambda _: None)
    finally:
        # what a thread sets for itself, torch takes as default for later threads
        torch.set_num_threads(before)
