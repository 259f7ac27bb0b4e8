"""The section of the page on where its numbers come from: model, data, run, settings."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.masking import mask_mapping, masked
from amici_eval.report.markup import cell, row, section, text
from amici_eval.report.sentences import permutations_text

if TYPE_CHECKING:
    from amici_eval.results.evaluation import HeadEvaluation

__all__ = ["identity_line", "plain", "provenance_section"]

_PACKAGES = ("amici-eval", "amici-st", "torch", "numpy", "scipy", "numba", "mlflow")
_LONGEST_IN_LINE = 80


def identity_line(evaluation: HeadEvaluation) -> str:
    """Return model and data in a line each."""
    lines = [
        f"{heading}: "
        + " · ".join(f"{key} {plain(value)}" for key, value in values.items() if len(plain(value)) <= _LONGEST_IN_LINE)
        for heading, values in (("Model", evaluation.model), ("Data", evaluation.data))
        if values
    ]
    return "".join(f'<p class="identity">{text(line)}</p>' for line in lines)


def provenance_section(
    evaluation: HeadEvaluation, *, run: Mapping[str, object] | None = None, written: datetime | None = None
) -> str:
    """Return what was evaluated, by which versions, on which device, when, with which settings."""
    settings = dict(_flat(evaluation.spec.to_dict()))
    facts = {
        "engine used": evaluation.engine,
        "device asked for": evaluation.spec.ablation.device,
        "permutations used": permutations_text(evaluation),
        "parity of engines": _parity(evaluation),
        **(run or {}),
        "page written": (written or datetime.now(timezone.utc)).strftime("%Y-%m-%d %H:%M:%S %Z").strip(),
    }
    groups = (
        ("Model", evaluation.model),
        ("Data", evaluation.data),
        ("Run", facts),
        ("Versions, where the page was written", _versions()),
        ("Settings", settings),
    )
    parts = [
        f'<h3>{text(heading)}</h3><div class="scroll" tabindex="0" role="region" aria-label="{text(heading)}">'
        f'<table class="facts"><tbody>{_listed(values)}</tbody></table></div>'
        for heading, values in groups
        if values
    ]
    return section("identity", "What was evaluated", "".join(parts))


def plain(value: object) -> str:
    """Return a value as text without credentials: a list or mapping as JSON."""
    known = masked(value)
    return (
        json.dumps(known, ensure_ascii=False, default=str) if isinstance(known, (Mapping, list, tuple)) else str(known)
    )


def _listed(values: Mapping[str, Any]) -> str:
    return "".join(row(key, [cell(plain(value), words=True)]) for key, value in mask_mapping(values).items())


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Return settings by the names that one would give to change them, as ``permutation.alpha``."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += (
            _flat(value, f"{before}{key}.") if isinstance(value, Mapping) and value else [(f"{before}{key}", value)]
        )
    return found


def _parity(evaluation: HeadEvaluation) -> str:
    if evaluation.parity is None:
        return "not compared"
    if not np.isfinite(evaluation.parity):
        return f"no finite number on {evaluation.parity_cells:,} cells"
    return f"largest difference {evaluation.parity:.2g} on {evaluation.parity_cells:,} cells"


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            # a page may be written from a stored evaluation, where not all is installed
            continue
    return found
