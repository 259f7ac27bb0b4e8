"""What happens in a worker process, and what it is sent."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.errors import LaunchError, first_line
from amici_eval.evaluation.protocols import SendableAccess

if TYPE_CHECKING:
    from collections.abc import Callable

    from amici_eval.evaluation.one_type import TypeEvaluation
    from amici_eval.evaluation.protocols import ModelAccess

__all__ = ["TypeWorker", "parts_of"]

_SHARED_BYTES = 2**20
"""Arrays of at least so many bytes are shared by the workers of a machine; smaller ones are copied to each."""


class TypeWorker:
    """Lives in a process of its own and evaluates one type at a time, on one thread."""

    def __init__(self) -> None:
        import torch

        import amici_eval.evaluation.tasks  # noqa: F401 - takes seconds, while the driver does something else

        torch.set_num_threads(1)
        self._key: int | None = None
        self._access: Any = None

    def is_up(self) -> bool:
        """Answer, once what is needed is imported."""
        return True

    def evaluate(self, key: int, shared: list[Any], task_and_settings: bytes) -> TypeEvaluation:
        """Return the evaluation of a type."""
        import ray
        import torch

        from amici_eval.evaluation.tasks import evaluate_task

        if key != self._key:
            self._key, self._access = None, None
            head, *arrays = ray.get(shared)
            self._access = pickle.loads(head, buffers=arrays)  # noqa: S301, RUF100 - from the driver
            self._key = key
        task, settings = pickle.loads(task_and_settings)  # noqa: S301, RUF100 - from the driver
        with torch.no_grad():
            return evaluate_task(self._access, task, settings, on_cells=_nobody, on_permutations=_nobody)


def _nobody(_: int) -> None:
    """Take no notice: progress is told by the driver, type by type."""


def parts_of(access: ModelAccess, *, dumps: Callable[..., bytes]) -> list[Any]:
    """Return an access as bytes and the large arrays that these refer to, which processes can share."""
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
