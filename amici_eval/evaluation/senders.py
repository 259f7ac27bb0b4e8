"""Effects of masking each type of sender, in one evaluation and between two."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.evaluation.tiles import kept_sums, tile_of
from amici_eval.results.analyses import Senders
from amici_eval.results.comparison import SenderDifferences
from amici_eval.stats.cell_chunks import over_blocks
from amici_eval.stats.explained_variance import MIN_CELLS_EXPLAINED_VARIANCE, TileSums
from amici_eval.stats.pvalues import adjust_p_values
from amici_eval.stats.tile_tests import ChangeTest, gene_intervals, paired_differences, share_changes, verdict_of
from amici_eval.stats.type_sums import masked_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jaxtyping import Float32, Float64, Int64

    from amici_eval.evaluation.protocols import FactorAccess
    from amici_eval.evaluation.tiles import EvaluatedCells
    from amici_eval.model.engines.factored import HeadOutputs
    from amici_eval.results.comparison import HeadMatches
    from amici_eval.results.evaluation import HeadEvaluation
    from amici_eval.settings.comparison import ComparisonSpec
    from amici_eval.settings.evaluation import PermutationSpec

WHY_NOT = "ablation.senders: who talks to whom needs the factored engine on cells with coordinates; not computed"

_N_FLIPS = 9999
_TOO_FEW = f"{{}} cell; explained variance needs at least {MIN_CELLS_EXPLAINED_VARIANCE}"
_NO_SUCH = "no evaluated cell of the type has such a neighbour"
_OF_GENES = ("effect", "low", "high", "p_value")


def evaluate_senders(
    access: FactorAccess,
    cells: EvaluatedCells,
    outputs: HeadOutputs,
    batches: Sequence[tuple[int, ...]],
    *,
    test: PermutationSpec,
    progress: Callable[[int], None] | None = None,
) -> Senders:
    """Return what each head takes from each type of sender, in each type of receiver.

    Masked and whole heads are compared as two models of the same cells: interval and p of their difference are from
    :func:`~amici_eval.stats.tile_tests.paired_differences`, on the same tiles, resamples and flips for all senders.
    """
    types, known, tiling = tuple(cells.receivers), access.card.cell_types, cells.tiling
    sums = outputs.by_sender
    assert sums is not None  # noqa: S101, RUF100 - the first batch was asked for
    assert tiling is not None  # noqa: S101, RUF100 - for the type checker
    shape = access.card.n_heads, len(types), len(known)
    found = _SenderLosses.empty(shape, len(access.card.genes), len(tiling.centers))
    receiver_codes = [known.index(cell_type) for cell_type in types]
    n_receivers = sums.n_receivers[receiver_codes]
    reasons: dict[tuple[str, str], str] = {}
    tiles = tile_of(tiling.keys)
    for number, batch in enumerate(batches):
        masked = outputs if number == 0 else access.attend(cells.rows, without_senders=batch)
        assert masked.without_senders is not None  # noqa: S101, RUF100 - it was asked for
        for cell_type, own in cells.slices.items():
            at, rows = types.index(cell_type), cells.usable[cell_type]
            near = [place for place, code in enumerate(batch) if n_receivers[at, code]]
            z = [masked.whole[own], *(masked.without_senders[place, own] for place in near)]
            reason = found.fill(
                at,
                [batch[place] for place in near],
                _masked_sums(access, cell_type, rows, z, tiles[own]) if near else [],
                test=test,
                label=cell_type,
            )
            if reason is not None:
                reasons[cell_type, ""] = reason
            if progress is not None:
                progress(len(rows) * len(batch))
        del masked, z
    n_cells = np.array([len(cells.usable.get(cell_type, ())) for cell_type in types], dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        attention = (sums.attention[receiver_codes] / n_cells[:, None, None]).transpose(2, 0, 1)
        coefficient = (sums.coefficient[receiver_codes] / sums.attention[receiver_codes]).transpose(2, 0, 1)
        distance = log(10.0) / coefficient
    for at, cell_type in enumerate(types):
        if cell_type not in cells.usable:
            reasons[cell_type, ""] = _TOO_FEW.format(len(cells.receivers[cell_type]))
            continue
        for code in np.flatnonzero(n_receivers[at] == 0).tolist():
            reasons[cell_type, known[code]] = _NO_SUCH
    return found.result(
        senders=known,
        test=test,
        n_receivers=n_receivers,
        attention=attention,
        distance=np.where(np.isfinite(distance), distance, np.nan),
        reasons=tuple((cell_type, sender, why) for (cell_type, sender), why in reasons.items()),
    )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _SenderLosses:
    """Arrays that are filled type by type: over all genes (H, C, S), by gene, and by tile."""

    overall: dict[str, Any]
    genes: dict[str, Any]
    lost_squares: Float64[np.ndarray, "heads types senders tiles"]

    @classmethod
    def empty(cls, shape: tuple[int, int, int], n_genes: int, n_tiles: int) -> _SenderLosses:
        return cls(
            overall={name: np.full(shape, np.nan) for name in _OF_GENES},
            genes={name: np.full((*shape, n_genes), np.nan) for name in _OF_GENES},
            lost_squares=np.full((*shape, n_tiles), np.nan),
        )

    def fill(
        self,
        at: int,
        senders: Sequence[int],
        sums: list[TileSums],
        *,
        test: PermutationSpec,
        label: str,
    ) -> str | None:
        """Fill in a receiver type without each of some senders; return the reason if something has no value."""
        if not sums:
            return None
        if not sums[0].varies.any():
            return f"no gene varies over the {sums[0].n_cells.sum()} cells"
        # heads that are not finite are left out; the resamples of the others do not change
        finite = np.all([np.isfinite(one.residual_m2).all(axis=(0, 2)) for one in sums], axis=0)
        heads = np.flatnonzero(
            np.all([finite, *(np.isfinite(one.residual_mean).all(axis=(0, 2)) for one in sums)], axis=0)
        )
        reason = "the predictions of some heads are not finite" if len(heads) < len(finite) else None
        whole = sums[0].of_models(heads)
        squares = whole.residual_squares.sum(axis=2)
        change = ChangeTest(
            confidence=test.confidence,
            n_resamples=max(1, test.n_bootstrap),
            n_flips=_N_FLIPS,
            seed=test.seed,
            label=label,
        )
        for sender, masked in zip(senders, sums[1:], strict=True):
            without = masked.of_models(heads)
            difference = paired_differences(without, whole, change)
            place = (heads, at, sender)
            lost = np.zeros((len(heads), self.lost_squares.shape[-1]))
            lost[:, whole.tiles] = (without.residual_squares.sum(axis=2) - squares).T
            self.lost_squares[place] = lost
            self.overall["effect"][place] = difference.difference
            self.overall["p_value"][place] = difference.p_value
            self.genes["effect"][place] = difference.difference_gene
            self.genes["p_value"][place] = difference.p_value_gene
            if test.n_bootstrap:
                between = gene_intervals(without, whole, confidence=test.confidence)
                self.overall["low"][place], self.overall["high"][place] = difference.low, difference.high
                self.genes["low"][place], self.genes["high"][place] = between.low, between.high
            reason = difference.reason or reason
        return reason if test.n_bootstrap else reason or "no interval: permutation.n_bootstrap=0"

    def result(self, *, senders: tuple[str, ...], test: PermutationSpec, **others: Any) -> Senders:
        # maxT needs permutations shared by all types; Holm controls the same error under any dependence
        method = "holm" if test.adjustment == "maxt" else test.adjustment
        effect_gene = self.genes["effect"]
        some = ~np.isnan(effect_gene).all(axis=3)
        best = np.where(some, np.nan_to_num(effect_gene, nan=-np.inf).argmax(axis=3), -1)
        of_best = np.take_along_axis(effect_gene, np.maximum(best, 0)[..., None], axis=3)[..., 0]
        return Senders(
            senders=senders,
            confidence=test.confidence,
            n_resamples=test.n_bootstrap,
            **self.overall,
            p_value_adj=adjust_p_values(self.overall["p_value"], method=method),
            best_gene=best.astype(np.int64),
            effect_best_gene=np.where(some, of_best, np.nan),
            **{f"{name}_gene": values for name, values in self.genes.items()},
            p_value_adj_gene=adjust_p_values(self.genes["p_value"], method=method),
            lost_squares=self.lost_squares,
            **others,
        )


def _masked_sums(
    access: FactorAccess,
    cell_type: str,
    rows: Int64[np.ndarray, " cells"],
    z: Sequence[Float32[np.ndarray, "cells outputs"]],
    tiles: Int64[np.ndarray, " cells"],
) -> list[TileSums]:
    return over_blocks(
        lambda blocks: masked_sums(z, access.readout(cell_type), blocks, tiles=tiles, device=access.statistics_device),
        lambda: access.expression_blocks(rows),
        what="moments with senders masked out",
        device=access.statistics_device,
    )


_OTHER_GENES = "the versions have other genes, and losses were kept over all genes together"
_NOT_KEPT = "no losses by tile were kept (moments.npz of an earlier version): evaluate again"
_SHOWN = ("attention", "effect", "distance", "low", "high")
_WORDS = {"better": "more", "worse": "less"}


def sender_differences_between(
    before: HeadEvaluation, after: HeadEvaluation, match: HeadMatches, spec: ComparisonSpec
) -> SenderDifferences | None:
    """Return changes in what matched heads take from each sender type; ``None`` if either lacks senders.

    A tile's share is the loss (squared residuals of the masked head minus those of the whole one, over the type's
    squares of expression) after minus before, tested by :func:`~amici_eval.stats.tile_tests.share_changes`. Losses
    are kept over all genes together, so that versions with other genes have differences without interval and p.
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
        rows = kept_sums(one, cell_type, before.genes)
        cells = rows.n_cells.astype(np.float64)
        target = rows.target_squares[:, rows.varies].sum(axis=1)
        losses = [
            moments.lost_squares[own, moments.cell_types.index(cell_type)][:, columns][:, :, rows.tiles]
            for moments, own, columns in ((one, heads[0], found.columns[0]), (other, heads[1], found.columns[1]))
        ]
        change = losses[1].astype(np.float64) - losses[0]
        told = share_changes(
            change.reshape(-1, len(cells)),
            target,
            cells,
            ChangeTest(
                confidence=spec.confidence,
                n_resamples=spec.n_bootstrap,
                n_flips=spec.n_flips,
                margin=spec.margin,
                seed=spec.seed,
                label=cell_type,
            ),
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
    """Sender results of two evaluations for the heads, receiver types and sender types that they share."""

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
