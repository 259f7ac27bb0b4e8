"""Settings of the permutation test, and which of them go together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from amici_eval.common.errors import InvalidSpecError
from amici_eval.settings.checks import require_int, require_one_of

__all__ = ["PermutationSpec", "default_n_permutations"]

SAMPLINGS = ("independent", "cyclic")
NULLS = ("free",)
SPATIAL_NULLS = ("lag", "tile", "sample", "torus", "none")
METHODS = ("monte_carlo", "sequential", "moments")
SPATIAL_METHODS = ("moments", "monte_carlo")
TAILS = ("none", "gpd")
CONVENTIONS = ("add_one", "reference")
ADJUSTMENTS = ("bh", "by", "maxt")


@dataclass(frozen=True, kw_only=True)
class PermutationSpec:
    """The permutation test of a head.

    Parameters
    ----------
    n_permutations
        Permutations per cell type; ``None`` takes ``ceil(n_heads * n_types / alpha)``.
    alpha
        Significance level, for the default number of permutations and for the marks in tables and figures.
    seed
        With the cell type and the permutation's number it determines each permutation.
    sampling
        ``independent``: each permutation is drawn on its own. ``cyclic``: all shifts of the cells along one random
        order, which form a group, so that the test is exact and costs next to nothing; a type needs more cells than
        ``n_permutations``, else its permutations are independent.
    convention
        ``add_one``: p = (b+1)/(m+1), valid and never 0 (Phipson & Smyth 2010). ``reference``: p = b/m as amici-st.
    null
        ``free``: cells of a type are exchangeable. In spatially autocorrelated tissue this is anticonservative. It
        fills the columns that amici-st has; ``spatial_null`` fills the others.
    method
        Of the free null. ``monte_carlo``: count random permutations. ``sequential``: stop a head at ``stop_at``
        exceedances (Besag & Clifford 1991). ``moments``: exact mean, variance and skewness of the
        statistic over all permutations, none drawn (Pearson III); types of fewer than 50 cells, whose law three moments
        do not tell, are counted over 100,000 permutations.
    stop_at
        Exceedances at which ``sequential`` stops.
    tail
        ``gpd``: p-values with fewer than 10 exceedances come from a generalised Pareto tail (Knijnenburg et al. 2009);
        ``none``: from counts alone.
    adjustment
        Over all defined heads x types. ``bh``: Benjamini-Hochberg; ``by``: Benjamini-Yekutieli (any dependence);
        ``maxt``: family-wise, step-down maxT on the shared permutations of the free null (Westfall & Young 1993), and
        Holm for the spatial null and the genes.
    spatial_null
        ``lag``: analytic, prediction and expression keep the smoothness they have; ``tile``: shuffled within tiles of
        ``tile_width``; ``sample``: within sections; ``torus``: random shifts of whole sections; ``none``.
    spatial_method
        Of ``tile`` and ``sample``: ``moments`` (exact, none drawn) or ``monte_carlo``.
    reach
        Of ``lag``: largest distance of pairs of cells, in coordinate units; ``None``: no limit.
    tile_width
        Of ``tile``, in coordinate units; ``None``: half the correlation length of the type.
    tile_widths
        Widths for p against scale, ascending, beside any spatial null; ``None``: half to four times the correlation
        length with ``spatial_null=tile``, none otherwise.
    n_shifts
        Of ``torus``.
    confidence, n_bootstrap
        Level and number of resamples of the intervals of explained variance; 0 resamples: none.
    """

    n_permutations: int | None = None
    alpha: float = 0.05
    seed: int = 0
    sampling: str = "independent"
    convention: str = "add_one"
    null: str = "free"
    method: str = "monte_carlo"
    stop_at: int = 20
    tail: str = "none"
    adjustment: str = "bh"
    spatial_null: str = "lag"
    spatial_method: str = "moments"
    reach: float | None = None
    tile_width: float | None = None
    tile_widths: tuple[float, ...] | None = None
    n_shifts: int = 999
    confidence: float = 0.95
    n_bootstrap: int = 1000

    def __post_init__(self) -> None:
        if self.n_permutations is not None:
            require_int("permutation.n_permutations", self.n_permutations, 1)
        require_int("permutation.seed", self.seed, 0)
        require_int("permutation.stop_at", self.stop_at, 1)
        require_int("permutation.n_shifts", self.n_shifts, 1)
        require_int("permutation.n_bootstrap", self.n_bootstrap, 0)
        for name, meaning, usual in (("alpha", "a significance level", 0.05), ("confidence", "a level", 0.95)):
            value = getattr(self, name)
            if not isinstance(value, float) or not 0.0 < value < 1.0:
                raise InvalidSpecError(
                    value=f"permutation.{name}={value!r}",
                    rule=f"{meaning} lies strictly between 0 and 1",
                    fix=f"set permutation.{name}={usual}",
                )
        require_one_of("permutation.sampling", self.sampling, SAMPLINGS)
        require_one_of("permutation.convention", self.convention, CONVENTIONS)
        require_one_of("permutation.null", self.null, NULLS)
        require_one_of("permutation.method", self.method, METHODS)
        require_one_of("permutation.tail", self.tail, TAILS)
        require_one_of("permutation.adjustment", self.adjustment, ADJUSTMENTS)
        require_one_of("permutation.spatial_null", self.spatial_null, SPATIAL_NULLS)
        require_one_of("permutation.spatial_method", self.spatial_method, SPATIAL_METHODS)
        if self.tile_widths is not None:
            widths = self.tile_widths if isinstance(self.tile_widths, (list, tuple)) else (self.tile_widths,)
            distinct = {_distance("tile_widths", width) for width in widths}
            object.__setattr__(self, "tile_widths", tuple(sorted(distinct)))
        for name in ("reach", "tile_width"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _distance(name, getattr(self, name)))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.tile_widths and self.spatial_null == "none":
            raise InvalidSpecError(
                value="permutation.tile_widths with permutation.spatial_null=none",
                rule="p against scale stands beside a spatial test",
                fix="set permutation.spatial_null=lag, or leave permutation.tile_widths out",
            )
        if self.tile_width is not None and self.spatial_null != "tile":
            raise InvalidSpecError(
                value=f"permutation.tile_width={self.tile_width:g} with permutation.spatial_null={self.spatial_null}",
                rule="it is the side of the squares within which the tile null shuffles cells",
                fix="set permutation.spatial_null=tile, or permutation.tile_widths for p against scale",
            )
        drawn = "independent permutations that are counted"
        for name, value, other, needed, rule in (
            ("adjustment", "maxt", "method", "monte_carlo", f"maxT compares {drawn}"),
            ("adjustment", "maxt", "sampling", "independent", f"maxT compares {drawn}"),
            ("tail", "gpd", "method", "monte_carlo", f"a tail is fitted to {drawn}"),
            ("tail", "gpd", "sampling", "independent", f"a tail is fitted to {drawn}"),
            ("method", "sequential", "sampling", "independent", "shifts of one order cannot be stopped early"),
            ("method", "sequential", "convention", "add_one", "amici-st stops nothing early"),
            ("method", "moments", "convention", "add_one", "without permutations there is no b/m"),
        ):
            if getattr(self, name) == value and getattr(self, other) != needed:
                raise InvalidSpecError(
                    value=f"permutation.{name}={value} with permutation.{other}={getattr(self, other)}",
                    rule=rule,
                    fix=f"set permutation.{other}={needed}, or leave permutation.{name} out for the default, "
                    f"{getattr(type(self), name)}",
                )


def _distance(name: str, value: object) -> float:
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not 0.0 < number < math.inf:
        raise InvalidSpecError(
            value=f"permutation.{name}={value!r}",
            rule="a distance is a number above 0, in the unit of the coordinates",
            fix="leave it out: the default follows from the data",
        )
    return number


def default_n_permutations(n_heads: int, n_types: int, alpha: float) -> int:
    """Return a number of permutations at which one lone test of the family reaches ``alpha`` if nothing exceeds it.

    Notes
    -----
    The same rule as amici-st: ``ceil(n_heads * n_types / alpha)``, types counted among the evaluated cells.
    """
    return math.ceil(n_heads * n_types / alpha)
