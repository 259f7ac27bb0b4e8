"""What is inferred beyond the free test: tests that hold in tissue, intervals, held-out cells, baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from amici_eval.results.named_arrays import NamedArrays

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from jaxtyping import Float64, Int64

__all__ = ["Baselines", "HeldOutParts", "Intervals", "SpatialTests"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SpatialTests(NamedArrays):
    """Tests of heads whose null respects that neighbouring cells resemble each other.

    Parameters
    ----------
    null
        ``lag``, ``tile``, ``sample`` or ``torus``.
    method
        How p came about, by type: ``lag_t``, ``moments``, ``monte_carlo``; empty where there is no test.
    p_value, p_value_adj
        Shape (H, C); NaN where undefined.
    p_ci_low, p_ci_high
        Monte Carlo interval of p, shape (H, C); equal to p where no permutation was drawn.
    statistic
        The standardised statistic, shape (H, C): how many standard deviations the fit lies above what the null expects.
    ess
        Effective sample size, shape (H, C): as many independent cells would give the statistic the same variance.
    detectable
        Smallest explained variance that would have been detected with 80 % power at alpha, shape (H, C).
    correlation_length
        Distance at which the correlation of expression within the type has fallen to 1/e, in coordinate units, shape
        (C,).
    reach
        Distance up to which the null takes correlation into account, in coordinate units, shape (C,): largest lag of
        ``lag``, tile width of ``tile``.
    p_value_gene, p_value_adj_gene
        Shape (H, C, G); one family of all heads x types x genes.
    widths, p_by_width
        Tile widths of each type, ascending, shape (W, C), and p within tiles of that width, shape (W, H, C): p against
        scale; W may be 0, and types may have fewer widths than others (NaN).
    reasons
        Why a (head, type name) has no test here, as ``(head, ct_name, reason)``; head -1 means all.
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

    Parameters
    ----------
    confidence, n_resamples
        Level, and bootstrap samples.
    n_tiles
        Tiles that hold cells of each type, shape (C,).
    tile_width
        Side of a tile in coordinate units.
    low, high
        Of each head kept alone, shape (H, C); NaN where a type lies in too few tiles.
    full_low, full_high
        Of the whole model, shape (C,).
    reasons
        Why a type has no interval, as ``(ct_name, reason)``.
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

    Parameters
    ----------
    n_cells
        Evaluated cells by part (in-sample, held out) and type, shape (2, C).
    expl_var
        Of each head kept alone over the cells of each part, shape (2, H, C); NaN where a part has too few cells.
    full
        Of the whole model, shape (2, C).
    low, high
        Interval of ``expl_var`` by the same block bootstrap, shape (2, H, C).
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
    """What predictors explain that know no head, on the same cells as the heads.

    Parameters
    ----------
    names
        ``neighbour_types``: ridge regression on how many neighbours are of each type; ``neighbour_expression``: on the
        mean expression of the neighbours; ``position``: a smooth function of position.
    fitted_on
        ``training cells``, or ``all evaluated cells`` where it is not known which the model was fitted on. A cell that
        is scored is never among those its prediction was fitted on (five folds): unlike the heads of a model that was
        fitted on the evaluated cells, so that gains in-sample flatter the heads.
    expl_var
        Aggregated over genes, shape (B, C); NaN where undefined.
    gain
        Explained variance of a head kept alone minus that of the best baseline of the type, shape (H, C).
    full_gain
        The same of the whole model, shape (C,).
    without_nearest
        Explained variance of each head kept alone if the nearest neighbour is masked out, shape (H, C): a head that
        reads what segmentation put into the wrong cell loses most of it; NaN where it was not computed.
    full_without_nearest
        The same of the whole model, shape (C,).
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
