"""Choice of where receiver types are evaluated: in this process or in others."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from amici_eval.evaluation.tasks import Launcher
    from amici_eval.settings.evaluation import LaunchSpec


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
    from amici_eval.evaluation.ray_launcher import RayLauncher

    with RayLauncher(spec) as launcher:
        yield launcher
