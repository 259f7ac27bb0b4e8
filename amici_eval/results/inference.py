"""Results beyond the free test: spatial tests, confidence intervals, held-out cells and baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from amici_eval.results.named_arrays import NamedArrays

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from jaxtyping import Float64, Int64


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SpatialTests(NamedArrays):
    """Tests of heads whose null respects that neighbouring cells resemble each other.

    ``null``: lag, tile, sample or torus; ``method`` by type: lag_t, moments, monte_carlo, or empty without a test.
    Without permutations the interval equals p. ``statistic``: deviations above the null's mean; ``ess``: independent
    cells with the same variance; ``detectable``: smallest explained variance found with 80 % power at alpha;
    ``correlation_length`` (fall to 1/e) and ``reach`` (largest lag or tile width): coordinate units. Genes: one family
    of heads x types x genes. ``widths``: ascending, NaN-padded. ``reasons``: (head or -1 for all, ct_name, reason).
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "p_value": "HC",
        "p_value_adj": "HC",
        "p_ci_low": "HC",
        "p_ci_high": "HC",
        "statistic": "HC",
        "ess": "HC",
        "detectable": "HC",
        "correlation_length": "C",
        "reach": "C",
        "p_value_gene": "HCG",
        "p_value_adj_gene": "HCG",
        "widths": "WC",
        "p_by_width": "WHC",
    }

    null: str
    method: tuple[str, ...]
    p_value: Float64[np.ndarray, "heads types"]
    p_value_adj: Float64[np.ndarray, "heads types"]
    p_ci_low: Float64[np.ndarray, "heads types"]
    p_ci_high: Float64[np.ndarray, "heads types"]
    statistic: Float64[np.ndarray, "heads types"]
    ess: Float64[np.ndarray, "heads types"]
    detectable: Float64[np.ndarray, "heads types"]
    correlation_length: Float64[np.ndarray, " types"]
    reach: Float64[np.ndarray, " types"]
    p_value_gene: Float64[np.ndarray, "heads types genes"]
    p_value_adj_gene: Float64[np.ndarray, "heads types genes"]
    widths: Float64[np.ndarray, "widths types"]
    p_by_width: Float64[np.ndarray, "widths heads types"]
    reasons: tuple[tuple[int, str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "reasons", tuple((int(h), str(t), str(why)) for h, t, why in self.reasons))

    @property
    def own_sizes(self) -> dict[str, int]:
        """Sizes that the record itself decides."""
        return {"W": len(self.widths)}

    @classmethod
    def sizes_in(cls, values: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes that plain values decide."""
        return {"W": len(values["widths"])}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Intervals(NamedArrays):
    """Confidence intervals of explained variance by a spatial block bootstrap over tiles.

    ``low`` and ``high`` are of each head kept alone, NaN where a type lies in too few tiles; ``tile_width`` is in
    coordinate units; ``reasons`` are (ct_name, reason).
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "n_tiles": "C",
        "low": "HC",
        "high": "HC",
        "full_low": "C",
        "full_high": "C",
    }

    confidence: float
    n_resamples: int
    tile_width: float
    n_tiles: Int64[np.ndarray, " types"]
    low: Float64[np.ndarray, "heads types"]
    high: Float64[np.ndarray, "heads types"]
    full_low: Float64[np.ndarray, " types"]
    full_high: Float64[np.ndarray, " types"]
    reasons: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "reasons", tuple((str(name), str(why)) for name, why in self.reasons))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeldOutParts(NamedArrays):
    """Explained variance on the cells a model was fitted on and on the others, side by side.

    Parts are in-sample and held out, in this order; values are NaN where a part has too few cells. The intervals are
    from the same block bootstrap as :class:`Intervals`.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "n_cells": "PC",
        "expl_var": "PHC",
        "full": "PC",
        "low": "PHC",
        "high": "PHC",
    }

    n_cells: Int64[np.ndarray, "parts types"]
    expl_var: Float64[np.ndarray, "parts heads types"]
    full: Float64[np.ndarray, "parts types"]
    low: Float64[np.ndarray, "parts heads types"]
    high: Float64[np.ndarray, "parts heads types"]

    @property
    def own_sizes(self) -> dict[str, int]:
        """Sizes that the record itself decides."""
        return {"P": 2}

    @classmethod
    def sizes_in(cls, values: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes that plain values decide."""
        del values
        return {"P": 2}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Baselines(NamedArrays):
    """Explained variance of predictors without heads, on the same cells as the heads.

    ``names``: ridge regression on counts of neighbours by type (neighbour_types) or on their mean expression
    (neighbour_expression), or a smooth function of position. Predictions are cross-fitted in five folds; heads that
    were fitted on the evaluated cells are not, so that in-sample gains flatter them. ``gain``: head kept alone minus
    best baseline of the type. ``without_nearest``: explained variance with the nearest neighbour masked out; it falls
    if a head reads transcripts that segmentation gave to the wrong cell.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "expl_var": "BC",
        "gain": "HC",
        "full_gain": "C",
        "without_nearest": "HC",
        "full_without_nearest": "C",
    }

    names: tuple[str, ...]
    fitted_on: str
    expl_var: Float64[np.ndarray, "baselines types"]
    gain: Float64[np.ndarray, "heads types"]
    full_gain: Float64[np.ndarray, " types"]
    without_nearest: Float64[np.ndarray, "heads types"]
    full_without_nearest: Float64[np.ndarray, " types"]

    @property
    def own_sizes(self) -> dict[str, int]:
        """Sizes that the record itself decides."""
        return {"B": len(self.names)}

    @classmethod
    def sizes_in(cls, values: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes that plain values decide."""
        return {"B": len(values["names"])}
