"""Who talks to whom: what each head takes from each type of sender, in each type of receiver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from amici_eval.results.named_arrays import NamedArrays

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from jaxtyping import Float64, Int64

__all__ = ["Senders"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Senders(NamedArrays):
    """Attention to each type of sender, and what a head explains less where these senders are masked out.

    Parameters
    ----------
    senders
        The S cell types of the model.
    confidence, n_resamples
        Level of the intervals, and bootstrap samples of them.
    n_receivers
        Evaluated cells of each type with at least one such neighbour, shape (C, S).
    attention
        Mean over all evaluated cells of a type of the summed attention to such neighbours, shape (H, C, S); what lacks
        to 1 over senders is the dummy's.
    effect
        Explained variance over all genes of the head kept alone minus the same with all neighbours of the sender type
        masked out (the others and the dummy share the attention), shape (H, C, S): what the head explains less without
        them. Below 0 the head explains more without them. It may exceed what the head explains: a masked neighbourhood
        is not what the model was trained on, and the masked head may be worse than none.
    low, high
        Its interval, by resampling tiles, shape (H, C, S).
    p_value, p_value_adj
        That the head explains as much without these senders in every tile, two-sided, by flips of the signs of tiles;
        adjusted over all heads x receiver types x sender types, shape (H, C, S).
    distance
        Distance over which attention to such a sender falls to a tenth, before it is shared with the others: ln(10)
        over the coefficient of the distance, which is averaged over the attended senders, weighted by their attention;
        in coordinate units, shape (H, C, S).
    best_gene, effect_best_gene
        The gene that loses most (position in the evaluation's genes; -1: none), and how much, shape (H, C, S).
    effect_gene, low_gene, high_gene, p_value_gene, p_value_adj_gene
        Of each gene, shape (H, C, S, G); the interval is linearised (:func:`~amici_eval.stats.tiles.gene_intervals.
        gene_intervals`); adjusted over all heads x receiver types x sender types x genes. They are kept in
        ``tables/sender_genes.parquet`` alone: ``None`` in an evaluation that was read back.
    lost_squares
        Squared residuals of the masked head minus those of the whole one, over all genes, about their means over all
        tiles, by tile, shape (H, C, S, tiles); NaN where undefined. They are kept in ``moments.npz`` alone: ``None`` in
        an evaluation that was read back.
    reasons
        Why something has no value, as ``(ct_name, sender, reason)``; an empty sender means all.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "n_receivers": "CS",
        "attention": "HCS",
        "effect": "HCS",
        "low": "HCS",
        "high": "HCS",
        "p_value": "HCS",
        "p_value_adj": "HCS",
        "distance": "HCS",
        "best_gene": "HCS",
        "effect_best_gene": "HCS",
    }
    whole_numbers: ClassVar[frozenset[str]] = frozenset({"best_gene"})
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

    def __post_init__(self) -> None:
        reasons = tuple((str(name), str(sender), str(why)) for name, sender, why in self.reasons)
        object.__setattr__(self, "reasons", reasons)

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise ``ValueError`` if an array has another shape than these sizes ask for, or there is no such gene."""
        super().check(sizes)
        expected = tuple(sizes[letter] for letter in "HCSG")
        for name in self.of_genes:
            values = getattr(self, name)
            if values is not None and values.shape != expected:
                msg = f"{type(self).__name__}.{name} has shape {values.shape}, not {expected}"
                raise ValueError(msg)
        if self.lost_squares is not None and self.lost_squares.shape[:-1] != expected[:-1]:
            msg = (
                f"{type(self).__name__}.lost_squares has shape {self.lost_squares.shape}, not {expected[:-1]} and tiles"
            )
            raise ValueError(msg)
        if self.best_gene.size and not -1 <= self.best_gene.min() <= self.best_gene.max() < sizes["G"]:
            msg = f"{type(self).__name__}.best_gene holds {self.best_gene.max()} for {sizes['G']} genes"
            raise ValueError(msg)

    def reason(self, cell_type: str, sender: str) -> str:
        """Return why something has no value for a pair of types; empty where everything has."""
        return "; ".join(why for name, of, why in self.reasons if name == cell_type and of in ("", sender))

    @property
    def own_sizes(self) -> dict[str, int]:
        """Sizes that the record itself decides."""
        return {"S": len(self.senders)}

    @classmethod
    def sizes_in(cls, values: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes that plain values decide."""
        return {"S": len(values["senders"])}
