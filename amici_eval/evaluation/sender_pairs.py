"""Two versions, or one on two data sets: what changed in who talks to whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.evaluation.type_tiles import kept_rows
from amici_eval.results.sender_changes import SenderDifferences
from amici_eval.stats.multiplicity import adjust_p_values
from amici_eval.stats.tiles.paired import verdict_of
from amici_eval.stats.tiles.tile_changes import share_changes, squares_about

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float64, Int64

    from amici_eval.results.evaluation import HeadEvaluation
    from amici_eval.results.matches import HeadMatches
    from amici_eval.results.senders import Senders
    from amici_eval.settings.comparison import ComparisonSpec

__all__ = ["sender_differences_between", "unpaired_sender_differences"]

_OTHER_GENES = "the versions have other genes, and losses were kept over all genes together"
_NOT_KEPT = "no losses by tile were kept (moments.npz of an earlier version): evaluate again"
_SHOWN = ("attention", "effect", "distance", "low", "high")
_WORDS = {"better": "more", "worse": "less"}


def sender_differences_between(
    before: HeadEvaluation, after: HeadEvaluation, match: HeadMatches, spec: ComparisonSpec
) -> SenderDifferences | None:
    """Return what matched heads take from each type of sender; ``None`` if senders were not computed for both.

    Notes
    -----
    The tile's share of a difference is that of the losses: what the masked head leaves of expression in a tile, minus
    what the whole head leaves, each against the squares of expression of the type. It goes the way of all differences
    (:func:`~amici_eval.stats.tiles.tile_changes.share_changes`). Losses are kept over all genes together, so that
    versions with other genes have differences without interval and p.
    """
    if before.senders is None or after.senders is None:
        return None
    kept = np.flatnonzero(match.partner >= 0)
    heads = kept, match.partner[kept]
    found = _SharedSenders.of((before, after), (before.senders, after.senders), heads)
    one, other = before.moments, after.moments
    assert one is not None  # noqa: S101, RUF100 - for the type checker
    assert other is not None  # noqa: S101, RUF100 - for the type checker
    low, high, p, inside = (np.full(found.difference.shape, np.nan) for _ in range(4))
    reasons = list(found.reasons)
    why_none = _OTHER_GENES if before.genes != after.genes else None
    if why_none is None and not (one.senders and other.senders):
        why_none = _NOT_KEPT
    for at, cell_type in enumerate(found.cell_types):
        if why_none is not None:
            reasons.append((cell_type, "", why_none))
            continue
        rows = kept_rows(one, cell_type, before.genes)
        cells = rows.n_cells.astype(np.float64)
        target = squares_about(cells, rows.target_mean, rows.target_m2)[:, rows.varies].sum(axis=1)
        losses = [
            moments.lost_squares[own, moments.cell_types.index(cell_type)][:, columns][:, :, rows.tiles]
            for moments, own, columns in ((one, heads[0], found.columns[0]), (other, heads[1], found.columns[1]))
        ]
        change = losses[1].astype(np.float64) - losses[0]
        told = share_changes(
            change.reshape(-1, len(cells)),
            target,
            cells,
            confidence=spec.confidence,
            n_resamples=spec.n_bootstrap,
            n_flips=spec.n_flips,
            margin=spec.margin,
            seed=spec.seed,
            label=cell_type,
        )
        shape = change.shape[:2]
        low[:, at], high[:, at] = told.low.reshape(shape), told.high.reshape(shape)
        p[:, at], inside[:, at] = told.p_value.reshape(shape), told.p_equivalence.reshape(shape)
        if told.reason is not None:
            reasons.append((cell_type, "", told.reason))
    adjusted = adjust_p_values(p, method=spec.adjustment)
    verdict = verdict_of(low=low, high=high, p_adjusted=adjusted, p_equivalence=inside, alpha=spec.alpha)
    return found.result(
        match.before,
        match.after,
        low=low,
        high=high,
        p_value=p,
        p_value_adj=adjusted,
        p_value_equivalence=inside,
        verdict=verdict,
        reasons=tuple(reasons),
    )


def unpaired_sender_differences(
    before: HeadEvaluation, after: HeadEvaluation, position: int, spec: ComparisonSpec
) -> SenderDifferences | None:
    """Compare one model on two data sets, whose intervals are independent (Zou & Donner 2008)."""
    one, other = before.senders, after.senders
    if one is None or other is None:
        return None
    heads = np.arange(before.n_heads)
    found = _SharedSenders.of((before, after), (one, other), (heads, heads))

    was, became = found.values
    low = found.difference - np.hypot(became["effect"] - became["low"], was["high"] - was["effect"])
    high = found.difference + np.hypot(became["high"] - became["effect"], was["effect"] - was["low"])
    with np.errstate(invalid="ignore"):
        verdict = np.select(
            [(low > -spec.margin) & (high < spec.margin), low > 0, high < 0], ["same", "better", "worse"], "undecided"
        )
    nothing = np.full(low.shape, np.nan)
    why = "data sets have other cells: there is no p of their difference"
    return found.result(
        position - 1,
        position,
        low=low,
        high=high,
        p_value=nothing,
        p_value_adj=nothing,
        p_value_equivalence=nothing,
        verdict=verdict,
        reasons=(*found.reasons, *((cell_type, "", why) for cell_type in found.cell_types)),
    )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _SharedSenders:
    """What two evaluations say of the heads, types of receivers and of senders that they share."""

    heads: tuple[Int64[np.ndarray, " matched"], Int64[np.ndarray, " matched"]]
    cell_types: tuple[str, ...]
    senders: tuple[str, ...]
    columns: tuple[Int64[np.ndarray, " senders"], Int64[np.ndarray, " senders"]]
    values: tuple[Mapping[str, Float64[np.ndarray, "matched types senders"]], ...]
    reasons: tuple[tuple[str, str, str], ...]

    @classmethod
    def of(
        cls,
        evaluations: tuple[HeadEvaluation, HeadEvaluation],
        senders: tuple[Senders, Senders],
        heads: tuple[Int64[np.ndarray, " matched"], Int64[np.ndarray, " matched"]],
    ) -> _SharedSenders:
        types = tuple(name for name in evaluations[0].cell_types if name in set(evaluations[1].cell_types))
        shared = tuple(name for name in senders[0].senders if name in set(senders[1].senders))
        rows = [np.array([own.cell_types.index(name) for name in types], dtype=np.int64) for own in evaluations]
        columns = [np.array([own.senders.index(name) for name in shared], dtype=np.int64) for own in senders]
        return cls(
            heads=heads,
            cell_types=types,
            senders=shared,
            columns=(columns[0], columns[1]),
            values=tuple(
                {name: getattr(own, name)[np.ix_(head, row, column)] for name in _SHOWN}
                for own, head, row, column in zip(senders, heads, rows, columns, strict=True)
            ),
            reasons=tuple(
                (name, sender, why)
                for name in types
                for sender in shared
                if (why := senders[0].reason(name, sender) or senders[1].reason(name, sender))
            ),
        )

    @property
    def difference(self) -> Float64[np.ndarray, "matched types senders"]:
        return self.values[1]["effect"] - self.values[0]["effect"]

    def result(
        self, before: int, after: int, *, verdict: np.ndarray, reasons: tuple[tuple[str, str, str], ...], **found: Any
    ) -> SenderDifferences:
        names = {"attention": "attention", "effect": "lost", "distance": "distance"}
        return SenderDifferences(
            before=before,
            after=after,
            cell_types=self.cell_types,
            senders=self.senders,
            head_before=self.heads[0],
            head_after=self.heads[1],
            difference=self.difference,
            reasons=reasons,
            verdict=tuple(_WORDS.get(word, word) for word in verdict.ravel().tolist()),
            **{
                f"{ours}_{when}": own[name]
                for when, own in zip(("before", "after"), self.values, strict=True)
                for name, ours in names.items()
            },
            **found,
        )
