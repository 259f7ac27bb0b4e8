"""Attention to and dependence on each type of sender, by head and type of receiver."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from amici_eval.results.named_arrays import NamedArrays

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from jaxtyping import Float64, Int64


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Senders(NamedArrays):
    """Attention to each type of sender, and what a head explains less where these senders are masked out.

    ``attention``: mean over all cells of the summed attention to such neighbours; the dummy has the rest. ``effect``:
    explained variance of the head alone minus that with the senders masked out; it can exceed what the head explains,
    as masked neighbourhoods are new to the model. p: two-sided sign flips of tiles. ``distance``: attention falls to a
    tenth, before the softmax; coordinate units. Genes: one family, linearised intervals. ``lost_squares``: masked minus
    whole squared residuals, about their means over all tiles. Genes and ``lost_squares`` are None after reading back.
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


SENDER_DIFFERENCE_COLUMNS = (
    "version_before",
    "version_after",
    "head_before",
    "head_after",
    "ct_name",
    "sender",
    "attention_before",
    "attention_after",
    "expl_var_lost_before",
    "expl_var_lost_after",
    "difference",
    "ci_low",
    "ci_high",
    "p_value",
    "p_value_adj",
    "p_value_equivalence",
    "verdict",
    "distance_tenth_before",
    "distance_tenth_after",
    "undefined_reason",
)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SenderDifferences(NamedArrays):
    """Changes in what matched heads take from each type of sender.

    ``lost_*`` and ``distance_*`` are ``effect`` and ``distance`` of :class:`Senders`. ``difference`` is the loss in
    ``after`` minus that in ``before``; p is two-sided by sign flips of tiles, ``p_value_equivalence`` small if the
    difference lies inside the margin. ``verdict`` (more: the head takes more than before; less, same, undecided) is
    row-major over M x C x S; an empty sender in ``reasons`` means all.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "head_before": "M",
        "head_after": "M",
        "attention_before": "MCS",
        "attention_after": "MCS",
        "lost_before": "MCS",
        "lost_after": "MCS",
        "distance_before": "MCS",
        "distance_after": "MCS",
        "difference": "MCS",
        "low": "MCS",
        "high": "MCS",
        "p_value": "MCS",
        "p_value_adj": "MCS",
        "p_value_equivalence": "MCS",
    }
    whole_numbers: ClassVar[frozenset[str]] = frozenset({"head_before", "head_after"})

    before: int
    after: int
    cell_types: tuple[str, ...]
    senders: tuple[str, ...]
    head_before: Int64[np.ndarray, " matched"]
    head_after: Int64[np.ndarray, " matched"]
    attention_before: Float64[np.ndarray, "matched types senders"]
    attention_after: Float64[np.ndarray, "matched types senders"]
    lost_before: Float64[np.ndarray, "matched types senders"]
    lost_after: Float64[np.ndarray, "matched types senders"]
    distance_before: Float64[np.ndarray, "matched types senders"]
    distance_after: Float64[np.ndarray, "matched types senders"]
    difference: Float64[np.ndarray, "matched types senders"]
    low: Float64[np.ndarray, "matched types senders"]
    high: Float64[np.ndarray, "matched types senders"]
    p_value: Float64[np.ndarray, "matched types senders"]
    p_value_adj: Float64[np.ndarray, "matched types senders"]
    p_value_equivalence: Float64[np.ndarray, "matched types senders"]
    verdict: tuple[str, ...]
    reasons: tuple[tuple[str, str, str], ...] = ()

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise ``ValueError`` if an array or the verdicts are of another size than these."""
        super().check(sizes)
        if len(self.verdict) != self.difference.size:
            msg = f"{type(self).__name__}.verdict has {len(self.verdict)} entries, not {self.difference.size}"
            raise ValueError(msg)

    @property
    def own_sizes(self) -> dict[str, int]:
        """Sizes that the record itself decides."""
        return {"M": len(self.head_before), "C": len(self.cell_types), "S": len(self.senders)}

    @classmethod
    def sizes_in(cls, values: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes that plain values decide."""
        return {"M": len(values["head_before"]), "C": len(values["cell_types"]), "S": len(values["senders"])}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], sizes: Mapping[str, int]) -> SenderDifferences:
        """Read what :meth:`to_record` gave."""
        reasons = tuple((str(name), str(sender), str(why)) for name, sender, why in record["reasons"])
        made: SenderDifferences = super().from_record({**record, "reasons": []}, sizes)
        return replace(made, reasons=reasons)

    def reason(self, cell_type: str, sender: str) -> str:
        """Return why something has no value for a pair of types; empty where everything has."""
        return "; ".join(why for name, of, why in self.reasons if name == cell_type and of in ("", sender))


def sender_differences_frame(labels: Sequence[str], found: Sequence[SenderDifferences]) -> pd.DataFrame:
    """Return a row per matched head x receiver type x sender type, of all pairs of versions."""
    import pandas as pd

    parts = []
    for one in found:
        head, receiver, sender = (places.ravel() for places in np.indices(one.difference.shape))
        reasons = np.array(
            [[one.reason(name, other) for other in one.senders] for name in one.cell_types], dtype=object
        ).reshape(len(one.cell_types), len(one.senders))
        missing = np.isnan(np.stack([one.difference, one.low, one.p_value])).any(axis=0).ravel()
        part = pd.DataFrame(
            {
                "version_before": labels[one.before],
                "version_after": labels[one.after],
                "head_before": one.head_before[head],
                "head_after": one.head_after[head],
                "ct_name": np.array(one.cell_types, dtype=object)[receiver],
                "sender": np.array(one.senders, dtype=object)[sender],
                "attention_before": one.attention_before.ravel(),
                "attention_after": one.attention_after.ravel(),
                "expl_var_lost_before": one.lost_before.ravel(),
                "expl_var_lost_after": one.lost_after.ravel(),
                "difference": one.difference.ravel(),
                "ci_low": one.low.ravel(),
                "ci_high": one.high.ravel(),
                "p_value": one.p_value.ravel(),
                "p_value_adj": one.p_value_adj.ravel(),
                "p_value_equivalence": one.p_value_equivalence.ravel(),
                "verdict": np.array(one.verdict, dtype=object),
                "distance_tenth_before": one.distance_before.ravel(),
                "distance_tenth_after": one.distance_after.ravel(),
                "undefined_reason": np.where(missing, reasons[receiver, sender], ""),
            },
            columns=list(SENDER_DIFFERENCE_COLUMNS),
        )
        parts.append(part)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(SENDER_DIFFERENCE_COLUMNS))
