"""Analyses beyond the free test: spatial tests, intervals, held-out cells, baselines, ablations, senders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from amici_eval.results.codec import Record
from amici_eval.settings.evaluation import MODES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float64, Int64


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SpatialTests(Record):
    """Tests of heads whose null respects that neighbouring cells resemble each other.

    ``null``: lag, tile, sample or torus; ``method`` by type: lag_t, moments, monte_carlo, or empty without a test.
    Without permutations the interval equals p. ``statistic``: deviations above the null's mean; ``ess``: independent
    cells with the same variance; ``detectable``: smallest explained variance found with 80 % power at alpha;
    ``correlation_length`` (fall to 1/e) and ``reach`` (largest lag or tile width): coordinate units. Genes: one family
    of heads x types x genes. ``widths``: ascending, NaN-padded. ``reasons``: (head or -1 for all, ct_name, reason).
    """

    sized_by: ClassVar[Mapping[str, str | int]] = {"widths": "widths"}

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


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Intervals(Record):
    """Confidence intervals of explained variance by a spatial block bootstrap over tiles.

    ``low`` and ``high`` are of each head kept alone, NaN where a type lies in too few tiles; ``tile_width`` is in
    coordinate units; ``reasons`` are (ct_name, reason).
    """

    confidence: float
    n_resamples: int
    tile_width: float
    n_tiles: Int64[np.ndarray, " types"]
    low: Float64[np.ndarray, "heads types"]
    high: Float64[np.ndarray, "heads types"]
    full_low: Float64[np.ndarray, " types"]
    full_high: Float64[np.ndarray, " types"]
    reasons: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeldOutParts(Record):
    """Explained variance on the cells a model was fitted on and on the others, side by side.

    Parts are in-sample and held out, in this order; values are NaN where a part has too few cells. The intervals are
    from the same block bootstrap as :class:`Intervals`.
    """

    sized_by: ClassVar[Mapping[str, str | int]] = {"parts": 2}

    n_cells: Int64[np.ndarray, "parts types"]
    expl_var: Float64[np.ndarray, "parts heads types"]
    full: Float64[np.ndarray, "parts types"]
    low: Float64[np.ndarray, "parts heads types"]
    high: Float64[np.ndarray, "parts heads types"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Baselines(Record):
    """Explained variance of predictors without heads, on the same cells as the heads.

    ``names``: ridge regression on counts of neighbours by type (neighbour_types) or on their mean expression
    (neighbour_expression), or a smooth function of position. Predictions are cross-fitted in five folds; heads that
    were fitted on the evaluated cells are not, so that in-sample gains flatter them. ``gain``: head kept alone minus
    best baseline of the type. ``without_nearest``: explained variance with the nearest neighbour masked out; it falls
    if a head reads transcripts that segmentation gave to the wrong cell.
    """

    sized_by: ClassVar[Mapping[str, str | int]] = {"baselines": "names"}

    names: tuple[str, ...]
    fitted_on: str
    expl_var: Float64[np.ndarray, "baselines types"]
    gain: Float64[np.ndarray, "heads types"]
    full_gain: Float64[np.ndarray, " types"]
    without_nearest: Float64[np.ndarray, "heads types"]
    full_without_nearest: Float64[np.ndarray, " types"]


SHAPLEY_MODES = ("shapley", "frozen_shapley")
"""Modes that share out the explained variance of the whole model among its heads; the others change one head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadAblations(Record):
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

    sized_by: ClassVar[Mapping[str, str | int]] = {"modes": "modes"}

    modes: tuple[str, ...]
    expl_var: Float64[np.ndarray, "modes heads types"]
    standard_error: Float64[np.ndarray, "heads types"]
    interaction: Float64[np.ndarray, "types heads heads"]
    frozen_interaction: Float64[np.ndarray, "types heads heads"]

    def __post_init__(self) -> None:
        if self.modes != tuple(mode for mode in MODES if mode in self.modes):
            msg = f"modes {self.modes!r}: they must be some of {MODES!r}, each once and in this order"
            raise ValueError(msg)
        if np.ndim(self.expl_var) != 3:
            msg = f"expl_var has shape {np.shape(self.expl_var)}; it must be (modes, heads, types)"
            raise ValueError(msg)
        _, n_heads, n_types = np.shape(self.expl_var)
        self.check({"heads": n_heads, "types": n_types})

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


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Senders(Record):
    """Attention to each type of sender, and what a head explains less where these senders are masked out.

    ``attention``: mean over all cells of the summed attention to such neighbours; the dummy has the rest. ``effect``:
    explained variance of the head alone minus that with the senders masked out; it can exceed what the head explains,
    as masked neighbourhoods are new to the model. p: two-sided sign flips of tiles. ``distance``: attention falls to a
    tenth, before the softmax; coordinate units. Genes: one family, linearised intervals. ``lost_squares``: masked minus
    whole squared residuals, about their means over all tiles. Genes and ``lost_squares`` are None after reading back.
    """

    sized_by: ClassVar[Mapping[str, str | int]] = {"senders": "senders"}
    of_genes: ClassVar[tuple[str, ...]] = ("effect_gene", "low_gene", "high_gene", "p_value_gene", "p_value_adj_gene")
    apart: ClassVar[tuple[str, ...]] = (*of_genes, "lost_squares")

    senders: tuple[str, ...]
    confidence: float
    n_resamples: int
    n_receivers: Int64[np.ndarray, "types senders"]
    attention: Float64[np.ndarray, "heads types senders"]
    effect: Float64[np.ndarray, "heads types senders"]
    low: Float64[np.ndarray, "heads types senders"]
    high: Float64[np.ndarray, "heads types senders"]
    p_value: Float64[np.ndarray, "heads types senders"]
    p_value_adj: Float64[np.ndarray, "heads types senders"]
    distance: Float64[np.ndarray, "heads types senders"]
    best_gene: Int64[np.ndarray, "heads types senders"]
    effect_best_gene: Float64[np.ndarray, "heads types senders"]
    effect_gene: Float64[np.ndarray, "heads types senders genes"] | None = None
    low_gene: Float64[np.ndarray, "heads types senders genes"] | None = None
    high_gene: Float64[np.ndarray, "heads types senders genes"] | None = None
    p_value_gene: Float64[np.ndarray, "heads types senders genes"] | None = None
    p_value_adj_gene: Float64[np.ndarray, "heads types senders genes"] | None = None
    lost_squares: Float64[np.ndarray, "heads types senders tiles"] | None = None
    reasons: tuple[tuple[str, str, str], ...] = ()

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise ``ValueError`` if an array has another shape than these sizes ask for, or there is no such gene."""
        super().check(sizes)
        if self.best_gene.size and not -1 <= self.best_gene.min() <= self.best_gene.max() < sizes["genes"]:
            msg = f"{type(self).__name__}.best_gene holds {self.best_gene.max()} for {sizes['genes']} genes"
            raise ValueError(msg)

    def reason(self, cell_type: str, sender: str) -> str:
        """Return why something has no value for a pair of types; empty where everything has."""
        return "; ".join(why for name, of, why in self.reasons if name == cell_type and of in ("", sender))
