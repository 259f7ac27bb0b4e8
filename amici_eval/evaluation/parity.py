"""Whether both engines predict the same, on a few cells of every type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from amici_eval.evaluation.protocols import FactorAccess

__all__ = ["Parity", "check_parity"]

PARITY_CELLS = 2
"""Cells of each type on which both engines are compared."""
PARITY_ROUNDING, PARITY_SHARE = 1e-5, 1e-3
"""Of the largest prediction, and of the largest difference that heads make to one."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the factored engine's predictions are from the hooked one's on some cells.

    Parameters
    ----------
    largest_difference
        Over cells, genes and ablations (each head alone, all, none); ``None`` if nothing was compared, infinite if one
        is finite where the other is not.
    scale
        Largest absolute prediction among them.
    signal
        Largest difference that the heads make to a prediction: what explained variance is about.
    n_cells
        Cells compared.
    """

    largest_difference: float | None = None
    scale: float = 0.0
    signal: float = 0.0
    n_cells: int = 0

    @property
    def tolerance(self) -> float:
        """What float32 rounding explains, and a thousandth of what the heads bring."""
        return PARITY_ROUNDING * self.scale + PARITY_SHARE * self.signal

    @property
    def holds(self) -> bool:
        """Whether the engines agree."""
        return self.largest_difference is None or self.largest_difference <= self.tolerance

    @property
    def complaint(self) -> str:
        """What to say if it does not hold."""
        return (
            f"evaluated by the hooked engine: the factored engine's predictions differ from it by up to "
            f"{self.largest_difference:.3g} on {self.n_cells} cells (tolerance {self.tolerance:.3g})"
        )


def check_parity(access: FactorAccess, receivers: Mapping[str, np.ndarray]) -> Parity:
    """Compare both engines on a few cells of every type, under every ablation that the test uses."""
    rows = np.concatenate(
        [
            members[np.linspace(0, len(members) - 1, min(PARITY_CELLS, len(members))).astype(np.int64)]
            for members in receivers.values()
        ]
        or [np.zeros(0, dtype=np.int64)]
    )
    if not len(rows):
        return Parity()
    keeps = [*((head,) for head in range(access.card.n_heads)), None, ()]
    here, there = access.predict(rows, keeps=keeps), access.predict_literally(rows, keeps=keeps)
    both = np.isfinite(here) & np.isfinite(there)
    if not np.array_equal(np.isfinite(here), np.isfinite(there)):
        return Parity(largest_difference=float("inf"), n_cells=len(rows))
    of_heads = np.where(both[-2] & both[-1], there[-2] - there[-1], 0.0)
    return Parity(
        largest_difference=float(np.abs(np.where(both, here, 0.0) - np.where(both, there, 0.0)).max()),
        scale=float(np.abs(np.where(both, there, 0.0)).max()),
        signal=float(np.abs(of_heads).max()),
        n_cells=len(rows),
    )
