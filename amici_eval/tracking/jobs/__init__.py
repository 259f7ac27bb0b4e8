"""What a command does: evaluate, compare, gate, watch, promote, upload; how it does that is the same for all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from amici_eval.settings.evaluation import LaunchSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from amici_eval.settings.evaluation import EvaluationSpec, ReportSpec, TrackingSpec


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """How a job evaluates, reports and tracks, whatever models and data it is about."""

    spec: EvaluationSpec
    report: ReportSpec
    tracking: TrackingSpec
    config_yaml: str
    progress: Callable[[int, int, str], None] | None = None
    launch: LaunchSpec = field(default_factory=LaunchSpec)
