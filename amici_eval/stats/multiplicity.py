"""Adjustment of p-values for the number of tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import false_discovery_control

if TYPE_CHECKING:
    from jaxtyping import Float64

__all__ = ["adjust_p_values"]


def adjust_p_values(p: Float64[np.ndarray, ...], *, method: str = "bh") -> Float64[np.ndarray, ...]:
    """Adjust p-values to control the false discovery rate among the tests that are defined.

    Parameters
    ----------
    p
        p-values of any shape; NaN marks an undefined test, which is no member of the family and stays NaN.
    method
        ``"bh"``: Benjamini & Hochberg (1995).

    Raises
    ------
    ValueError
        If a p-value lies outside [0, 1] or the method is unknown.
    """
    if method != "bh":
        msg = f"method {method!r} is unknown; use 'bh'"
        raise ValueError(msg)
    flat = np.asarray(p, dtype=np.float64)
    defined = ~np.isnan(flat)
    adjusted = np.full(flat.shape, np.nan)
    if defined.any():
        adjusted[defined] = false_discovery_control(flat[defined], method="bh")
    return adjusted
