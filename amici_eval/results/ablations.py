"""Results of the ablations: heads kept, left out or replaced, and their Shapley values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from amici_eval.settings.evaluation import MODES

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float64

SHAPLEY_MODES = ("shapley", "frozen_shapley")
"""Modes that share out the explained variance of the whole model among its heads; the others change one head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadAblations:
    """What happens to a model's explained variance when its heads are taken away in different ways.

    Parameters
    ----------
    modes
        Some of :data:`amici_eval.settings.evaluation.MODES`, in that order. Explained variance, over all genes, of the
        model with

        - ``keep_one``: this head alone;
        - ``leave_one_out``: all heads but this one;
        - ``mean_z``: this head's output replaced by its mean over the type's cells, so that it says nothing of single
          cells;
        - ``resampled_z``: this head's output replaced by that of other cells of the type;
        - ``frozen_norm``: this head alone, with the layer norm's divisor kept as in the whole model.

        ``shapley`` and ``frozen_shapley`` are the head's Shapley value instead: its share of the explained variance of
        the whole model minus that of the model without heads, the second with the layer norm's divisor kept.
    expl_var
        Shape (modes, H, C); NaN where undefined.
    standard_error
        Of ``shapley``, shape (H, C); 0 where it is exact, NaN where it is undefined.
    interaction, frozen_interaction
        Pair interaction of heads per type, shape (C, H, H), symmetric; NaN where not computed. Above 0 two heads
        explain more together than the sum of what each adds, below 0 they explain partly the same.

    Raises
    ------
    ValueError
        If a mode is unknown or out of order, or shapes do not fit each other.
    """

    modes: tuple[str, ...]
    expl_var: Float64[np.ndarray, "modes heads types"]
    standard_error: Float64[np.ndarray, "heads types"]
    interaction: Float64[np.ndarray, "types heads heads"]
    frozen_interaction: Float64[np.ndarray, "types heads heads"]

    def __post_init__(self) -> None:
        if self.modes != tuple(mode for mode in MODES if mode in self.modes):
            msg = f"modes {self.modes!r}: they must be some of {MODES!r}, each once and in this order"
            raise ValueError(msg)
        if self.expl_var.ndim != 3:
            msg = f"expl_var has shape {self.expl_var.shape}; it must be (modes, heads, types)"
            raise ValueError(msg)
        _, n_heads, n_types = self.expl_var.shape
        for name, expected in array_shapes(len(self.modes), n_heads, n_types).items():
            if getattr(self, name).shape != expected:
                msg = f"{name} has shape {getattr(self, name).shape}; it must be {expected}"
                raise ValueError(msg)

    def of(self, mode: str) -> Float64[np.ndarray, "heads types"]:
        """Return the values of one mode, shape (H, C).

        Raises
        ------
        ValueError
            If the mode was not computed.
        """
        if mode not in self.modes:
            msg = f"mode {mode!r} was not computed; there are {', '.join(self.modes) or 'none'}"
            raise ValueError(msg)
        values: np.ndarray = self.expl_var[self.modes.index(mode)]
        return values


def array_shapes(n_modes: int, n_heads: int, n_types: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of :class:`HeadAblations`."""
    return {
        "expl_var": (n_modes, n_heads, n_types),
        "standard_error": (n_heads, n_types),
        "interaction": (n_types, n_heads, n_heads),
        "frozen_interaction": (n_types, n_heads, n_heads),
    }
