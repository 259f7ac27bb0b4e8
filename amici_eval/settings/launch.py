"""Frozen, validated settings of where an evaluation runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from amici_eval.common.errors import DeviceError, InvalidSpecError
from amici_eval.settings.checks import require_int, require_one_of


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """Where receiver types are evaluated; the numbers are the same everywhere, so they do not belong to an evaluation.

    Parameters
    ----------
    kind
        ``local``: in this process, on its threads. ``ray``: in worker processes of Ray, one type at a time each.
    address
        Of a running Ray cluster, as ``host:port``; ``None`` starts one on this machine, on loopback, and stops it
        behind the work.
    n_workers
        Worker processes, of one thread each; ``None``: as many as there are processors. Never more than types.
    retries
        How often a type is evaluated again whose worker was lost.
    """

    kind: str = "local"
    address: str | None = None
    n_workers: int | None = None
    retries: int = 2

    def __post_init__(self) -> None:
        require_one_of("launch.kind", self.kind, ("local", "ray"))
        require_int("launch.retries", self.retries, 0)
        if self.n_workers is not None:
            require_int("launch.n_workers", self.n_workers, 1)
        if self.address is not None and not re.fullmatch(r"[^/\s]+:\d+", self.address):
            raise InvalidSpecError(
                value=f"launch.address={self.address!r}",
                rule="it must be the host:port at which `ray start --head` says that the cluster is",
                fix="write it as 10.0.0.5:6379, or leave it out to start a cluster on this machine",
            )
        if self.kind == "local" and (self.address is not None or self.n_workers is not None):
            raise InvalidSpecError(
                value="launch.address or launch.n_workers with launch=local",
                rule="one process has neither",
                fix="set launch=ray",
            )

    def check_device(self, device: str) -> None:
        """Refuse worker processes for an evaluation that does not compute on processors.

        Parameters
        ----------
        device
            Torch device of the evaluation.

        Raises
        ------
        DeviceError
            If the two do not go together.
        """
        if self.kind != "local" and device != "cpu":
            raise DeviceError(
                value=f"launch={self.kind} on the device {device}",
                rule="workers compute on processors, which round otherwise than that device",
                fix=f"set ablation.device=cpu, or leave out launch={self.kind}",
            )
