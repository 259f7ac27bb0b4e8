"""Threads of this process, and kernels that numba compiles."""

from __future__ import annotations

import importlib
import logging
import pickle
import threading
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from amici_eval.common.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from concurrent.futures import Future

logger = logging.getLogger(__name__)

_SPOILT = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
)
"""Errors that reading a pickle raises if it was cut off or overwritten."""


def check_compiler() -> None:
    """Refuse to go on where numba's compiler is switched off: permutations and attention need it."""
    if importlib.import_module("numba").config.DISABLE_JIT:
        raise DeviceError(
            value="NUMBA_DISABLE_JIT=1", rule="permutations and attention are compiled by numba", fix="unset it"
        )


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Return a function that numba compiles when it is first called and that runs without the interpreter's lock.

    Compiled code is kept on disk for later processes if numba finds a folder for it (``NUMBA_CACHE_DIR`` names
    another).
    """
    numba = importlib.import_module("numba")
    try:
        dispatcher = numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written to
        return numba.njit(nogil=True, **options)(function)
    _tolerate_cache_errors(getattr(dispatcher, "_cache", None))
    return dispatcher


def _tolerate_cache_errors(cache: Any) -> None:
    """Compile anew where a file of the cache is damaged, and do without the cache where it cannot be written."""
    load, save = getattr(cache, "load_overload", None), getattr(cache, "save_overload", None)
    if load is None or save is None:
        return

    def load_if_whole(*arguments: Any) -> Any:
        try:
            return load(*arguments)
        except _SPOILT as error:
            logger.debug("compiled code in %s is spoilt (%s) and made anew", cache.cache_path, type(error).__name__)
        # write an index without entries: what it named is compiled again
        with suppress(OSError):
            cache.flush()
        return None

    def save_if_possible(*arguments: Any) -> None:
        try:
            save(*arguments)
        except OSError as error:
            logger.debug("compiled code cannot be kept in %s: %s", cache.cache_path, error)

    cache.load_overload, cache.save_overload = load_if_whole, save_if_possible


Result = TypeVar("Result")


_WAITING_PER_THREAD = 8


def cuts(length: int, n_parts: int, *, multiple: int = 1) -> list[tuple[int, int]]:
    """Cut 0 to ``length`` into at most ``n_parts`` ranges that begin at multiples of ``multiple``."""
    step = max(1, -(-length // (n_parts * multiple))) * multiple
    return [(first, min(first + step, length)) for first in range(0, length, step)]


def in_threads(tasks: Iterable[Callable[[], Result]], n_threads: int, done: Callable[[Result], object]) -> None:
    """Run tasks that release the interpreter's lock; pass each result to ``done`` in order, in the calling thread.

    Tasks are taken from the iterable as needed. After an error or an interrupt, running tasks finish and no other
    begins.
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


_LOOK_S = 0.2


class _StoppedError(Exception):
    """Raised inside a task to stop it when its result is not needed any more."""


def run_side_by_side(
    tasks: Mapping[str, Callable[[Callable[[int], None]], Result]],
    counters: Mapping[str, Callable[[int], None]],
    *,
    alone: bool = False,
) -> Iterator[tuple[str, Result]]:
    """Run tasks, as many at a time as torch has threads, and yield each result as it comes.

    Within a task torch uses one thread: threads that meet after every small operation mostly wait for each other.
    """
    import torch

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
    """Run tasks, several at a time, each with torch on one thread; tasks are taken from the iterable as needed."""
    if n_threads <= 1:
        for task in tasks:
            task()
        return
    import torch

    before = torch.get_num_threads()

    def alone(task: Callable[[], None]) -> None:
        torch.set_num_threads(1)
        task()

    try:
        in_threads((partial(alone, task) for task in tasks), n_threads, lambda _: None)
    finally:
        # what a thread sets for itself, torch takes as default for later threads
        torch.set_num_threads(before)
