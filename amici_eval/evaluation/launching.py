"""Where receiver types are evaluated: in this process, or in worker processes of Ray."""

from __future__ import annotations

import itertools
import logging
import math
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from amici_eval.common.errors import LaunchError, first_line
from amici_eval.common.threads import run_side_by_side
from amici_eval.evaluation.one_type import evaluate_task
from amici_eval.evaluation.protocols import SendableAccess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from amici_eval.evaluation.one_type import TypeEvaluation, TypeSettings, TypeTask
    from amici_eval.evaluation.protocols import ModelAccess, PermutationMeter
    from amici_eval.settings.evaluation import LaunchSpec


class Launcher(Protocol):
    """Evaluates types elsewhere, with the numbers that one thread of this process would give."""

    def prepare(self, n_tasks: int) -> None:
        """Start workers for a number of types, while this process does the work that spans types."""
        ...

    def run(
        self, access: ModelAccess, tasks: Sequence[TypeTask], settings: TypeSettings, *, heartbeat: Callable[[], None]
    ) -> Iterator[tuple[str, TypeEvaluation]]:
        """Yield the evaluation of each type as it finishes; ``heartbeat`` is called repeatedly and may raise."""
        ...


@contextmanager
def open_launcher(spec: LaunchSpec) -> Iterator[Launcher | None]:
    """Yield what evaluates types by some settings, for :func:`amici_eval.evaluate`; ``None``: this process does.

    Parameters
    ----------
    spec
        Where, and in how many processes.

    Raises
    ------
    LaunchError
        If there is no such place: Ray is not installed, or no cluster answers.

    Notes
    -----
    What was started is stopped when the body ends, also when it raises.
    """
    if spec.kind == "local":
        yield None
        return
    with RayLauncher(spec) as launcher:
        yield launcher


_SIDE_BY_SIDE_CELLS = 4096
"""Types of at most this many cells are tested several at a time, on one thread each, as their arrays are small."""


def side_by_side_types(access: ModelAccess, tasks: Sequence[TypeTask]) -> frozenset[str]:
    """Return the types that are evaluated side by side, on one thread each; the others follow one by one.

    ``tasks`` are of all types, also of those that are finished already: the number of threads may change a type's
    numbers by rounding.
    """
    if access.statistics_device != "cpu":
        return frozenset()
    # a type with many of the cells would run on one thread while the others idle
    small = max(_SIDE_BY_SIDE_CELLS, sum(len(task.rows) for task in tasks) // (2 * torch.get_num_threads()))
    return frozenset(task.cell_type for task in tasks if task.z is not None and len(task.rows) <= small)


def evaluate_here(
    access: ModelAccess,
    tasks: Sequence[TypeTask],
    settings: TypeSettings,
    *,
    side_by_side: frozenset[str],
    counters: Mapping[str, PermutationMeter],
    on_cells: Mapping[str, Callable[[int], None]],
) -> Iterator[tuple[str, TypeEvaluation]]:
    """Yield the evaluation of each type as it finishes: large ones one by one, then small ones side by side."""
    n_threads, turn = torch.get_num_threads(), Lock()

    def evaluate_one(task: TypeTask, on_permutations: Callable[[int], None]) -> TypeEvaluation:
        large = len(task.rows) > _SIDE_BY_SIDE_CELLS
        # tests of two large types would compete for the cache; the cyclic test is too short to matter
        takes_turns = large and settings.test.sampling != "cyclic"
        return evaluate_task(
            access,
            task,
            settings,
            on_cells=on_cells[task.cell_type],
            on_permutations=on_permutations,
            in_turn=turn if takes_turns else None,
            n_threads=n_threads if large else None,
        )

    together: dict[str, Callable[[Callable[[int], None]], TypeEvaluation]] = {}
    for task in tasks:
        if task.cell_type in side_by_side:
            together[task.cell_type] = partial(evaluate_one, task)
        else:
            yield task.cell_type, evaluate_one(task, counters[task.cell_type])
    yield from run_side_by_side(together, counters, alone=len(side_by_side) <= 1)


_ANSWER_S = 10.0
_ENVIRONMENT = {
    # send no usage statistics
    "RAY_USAGE_STATS_ENABLED": "0",
    # workers use the CPU only: Ray need not change which accelerators they see
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def import_ray() -> Any:
    """Return the module ``ray``."""
    try:
        import ray
    except ImportError as error:
        raise LaunchError(
            value="launch=ray without the package ray",
            rule="launch=ray needs the extra",
            fix="pip install 'amici-eval[ray]', or leave out launch=ray",
        ) from error
    return ray


def check_listens(address: str) -> None:
    """Raise OSError if nothing listens at an address, because Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()


@contextmanager
def environment() -> Iterator[None]:
    """Set the environment variables that Ray reads on import and start; its child processes inherit them."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def own_handlers() -> Iterator[None]:
    """Keep our handler of SIGTERM, which Ray replaces by one that exits at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_SHARED_BYTES = 2**20
"""Arrays of at least this size are shared by the workers of a machine; smaller ones are copied to each."""


class TypeWorker:
    """Evaluates one type at a time in a process of its own, on one thread."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._key: int | None = None
        self._access: Any = None

    def is_up(self) -> bool:
        """Return True once the process has started and imported this module."""
        return True

    def evaluate(self, key: int, shared: list[Any], task_and_settings: bytes) -> TypeEvaluation:
        """Return the evaluation of a type."""
        import ray

        if key != self._key:
            self._key, self._access = None, None
            head, *arrays = ray.get(shared)
            self._access = pickle.loads(head, buffers=arrays)  # noqa: S301, RUF100 - from the driver
            self._key = key
        task, settings = pickle.loads(task_and_settings)  # noqa: S301, RUF100 - from the driver
        with torch.no_grad():
            return evaluate_task(self._access, task, settings, on_cells=_nobody, on_permutations=_nobody)


def _nobody(_: int) -> None:
    """Ignore progress, because the driver reports it type by type."""


def parts_of(access: ModelAccess, *, dumps: Callable[..., bytes]) -> list[Any]:
    """Return the pickled access without its large arrays, then these arrays, which processes can share."""
    arrays: list[np.ndarray] = []

    def stays_in(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _SHARED_BYTES:
            return True
        arrays.append(np.frombuffer(raw, dtype=np.uint8))
        return False

    to_send = access.to_send() if isinstance(access, SendableAccess) else access
    try:
        head = dumps(to_send, protocol=5, buffer_callback=stays_in)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise LaunchError(
            value=f"the model cannot be sent to workers: {first_line(error)}",
            rule="with launch=ray a model, its hooks and its data must be picklable",
            fix="leave out launch=ray",
        ) from error
    return [head, *arrays]


logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 500 * 2**20
"""Shared memory of a cluster started here; Ray puts what exceeds it into a file, which is slower."""
_LOOK_S = 0.5
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
_PATIENCE_S = 30.0
"""Time after which workers that have not come up are logged."""


class RayLauncher:
    """A :class:`~amici_eval.evaluation.launching.Launcher` over Ray; use it as a context manager.

    A cluster started here listens on loopback, has no dashboard, and is stopped on leaving. In an existing cluster,
    only the workers started here are ended. If the process is connected to Ray already, that connection is used and
    stays open.
    """

    def __init__(self, spec: LaunchSpec) -> None:
        self._spec = spec
        self._ray: Any = None
        self._worker_class: Any = None
        self._idle: list[Any] = []
        self._workers: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._opened_here = False
        self._folder: str | None = None
        self._numbers = itertools.count()

    def __enter__(self) -> RayLauncher:
        with environment():
            ray = self._ray = import_ray()
            if not ray.is_initialized():
                self._connect()
        # no restarts by Ray: this class replaces lost workers and repeats their types
        self._worker_class = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(TypeWorker)
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            for worker in self._workers:
                self._ray.kill(worker, no_restart=True)
        finally:
            self._idle, self._workers, self._starting = [], [], {}
            if self._opened_here:
                self._opened_here = False
                with own_handlers():
                    self._ray.shutdown()
                if self._folder is not None:
                    shutil.rmtree(self._folder, ignore_errors=True)

    def prepare(self, n_tasks: int) -> None:
        """Start as many workers as are wanted and have something to do; they import packages meanwhile."""
        n_processors = int(self._ray.cluster_resources().get("CPU", 0))
        if self._spec.n_workers is not None and self._spec.n_workers > n_processors:
            raise LaunchError(
                value=f"launch.n_workers={self._spec.n_workers}",
                rule=f"each worker takes a processor, and the cluster has {n_processors}",
                fix=f"set launch.n_workers={max(1, n_processors)}, or give Ray more processors",
            )
        wanted = min(n_tasks, self._spec.n_workers or max(1, n_processors))
        while len(self._workers) < wanted:
            self._start_worker()

    def run(
        self, access: ModelAccess, tasks: Sequence[TypeTask], settings: TypeSettings, *, heartbeat: Callable[[], None]
    ) -> Iterator[tuple[str, TypeEvaluation]]:
        """Yield the evaluation of each type as it finishes; the largest types start first."""
        self._spec.check_device(access.statistics_device)
        ray = self._ray
        self.prepare(len(tasks))
        # workers fetch these once themselves; as arguments Ray would resolve them for each task
        key, shared = next(self._numbers), [ray.put(part) for part in parts_of(access, dumps=ray.cloudpickle.dumps)]
        waiting = sorted(tasks, key=lambda task: len(task.rows))
        running: dict[Any, tuple[Any, TypeTask]] = {}
        losses: Counter[str] = Counter()
        say_at = time.monotonic() + _PATIENCE_S
        try:
            while waiting or running:
                while waiting and self._idle:
                    worker, task = self._idle.pop(), waiting.pop()
                    # pickled here, so that the worker's unpickled copy is writable
                    sent = pickle.dumps((task, settings), protocol=5)
                    running[worker.evaluate.remote(key, shared, sent)] = worker, task
                try:
                    finished, _ = ray.wait(list(running), timeout=_LOOK_S)
                finally:
                    # also if interrupted: Ray turns any signal into Ctrl-C, and the heartbeat knows which one came
                    heartbeat()
                if time.monotonic() > say_at:
                    say_at = math.inf
                    self._say_who_waits()
                for reference in finished:
                    worker, task = running.pop(reference)
                    try:
                        result = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        raise error.cause from error
                    except ray.exceptions.RayError as error:
                        losses[task.cell_type] += 1
                        self._replace(worker, task.cell_type, error, n_losses=losses[task.cell_type])
                        waiting.append(task)
                        continue
                    self._idle.append(worker)
                    yield task.cell_type, result
        finally:
            # end workers whose results are no longer needed
            for worker, _ in running.values():
                self._end(worker)

    def _connect(self) -> None:
        try:
            with own_handlers():
                if self._spec.address is None:
                    self._start_cluster()
                else:
                    check_listens(self._spec.address)
                    self._ray.init(address=self._spec.address, **_QUIET)
        except (OSError, RuntimeError, ValueError) as error:
            self._ray.shutdown()
            if self._spec.address is not None:
                raise LaunchError(
                    value=f"launch.address={self._spec.address}: {first_line(error)}",
                    rule="there must be a Ray cluster at the address, of the same versions of Ray and Python",
                    fix="look with `ray status --address HOST:PORT`, or leave it out to start one on this machine",
                ) from error
            raise LaunchError(
                value=f"launch=ray: {first_line(error)}",
                rule="a cluster of our own must start on this machine",
                fix=f"see the logs in {self._folder}, or leave out launch=ray",
            ) from error
        self._opened_here = True

    def _start_cluster(self) -> None:
        # not /tmp/ray, which may belong to another user; paths of sockets must be short
        self._folder = tempfile.mkdtemp(prefix="amici-ray-")
        self._ray.init(
            # ignore RAY_ADDRESS
            address="local",
            num_cpus=self._spec.n_workers,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=self._folder,
            **_QUIET,
        )

    def _start_worker(self) -> None:
        worker = self._worker_class.remote()
        self._workers.append(worker)
        self._idle.append(worker)
        self._starting[worker] = worker.is_up.remote()

    def _say_who_waits(self) -> None:
        """Log how many workers have not come up: in a busy cluster they may never, and Ray does not report it."""
        up, _ = self._ray.wait(list(self._starting.values()), num_returns=len(self._starting), timeout=0)
        n_waiting = len(self._starting) - len(up)
        if n_waiting:
            n_processors = int(self._ray.cluster_resources().get("CPU", 0))
            logger.warning(
                "%d of %d workers wait for a free processor: the cluster has %d",
                n_waiting,
                len(self._starting),
                n_processors,
            )

    def _end(self, worker: Any) -> None:
        self._workers.remove(worker)
        self._starting.pop(worker, None)
        self._ray.kill(worker, no_restart=True)

    def _replace(self, worker: Any, cell_type: str, error: Exception, *, n_losses: int) -> None:
        # the worker may still run if only its answer was lost
        self._end(worker)
        if n_losses > self._spec.retries:
            raise LaunchError(
                value=f"{cell_type}: its worker was lost {n_losses} times, at last by {first_line(error)}",
                rule=f"a type is tried again {self._spec.retries} times (launch.retries)",
                fix="if workers ran out of memory, set a smaller launch.n_workers; else raise launch.retries",
            ) from error
        logger.warning("%s: its worker was lost (%s); trying again with another", cell_type, first_line(error))
        self._start_worker()
