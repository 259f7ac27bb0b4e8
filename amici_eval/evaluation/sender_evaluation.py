"""Evaluate who talks to whom: each head with each type of sender masked out of the neighbourhood."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.results.senders import Senders
from amici_eval.stats.cell_chunks import over_blocks
from amici_eval.stats.explained_variance import MIN_CELLS_EXPLAINED_VARIANCE
from amici_eval.stats.multiplicity import adjust_p_values
from amici_eval.stats.permutation.masked_moments import masked_moments
from amici_eval.stats.tiles.gene_intervals import gene_intervals
from amici_eval.stats.tiles.paired import PairedRows, paired_differences
from amici_eval.stats.tiles.tile_changes import squares_about

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jaxtyping import Float32, Float64, Int64

    from amici_eval.evaluation.protocols import FactorAccess
    from amici_eval.model.engines.factored import HeadOutputs
    from amici_eval.settings.permutation import PermutationSpec
    from amici_eval.stats.permutation.masked_moments import MaskedMoments

__all__ = ["WHY_NOT", "evaluate_senders"]

WHY_NOT = "ablation.senders: who talks to whom needs the factored engine on cells with coordinates; not computed"

_N_FLIPS = 9999
_TOO_FEW = f"{{}} cell; explained variance needs at least {MIN_CELLS_EXPLAINED_VARIANCE}"
_NO_SUCH = "no evaluated cell of the type has such a neighbour"
_OF_GENES = ("effect", "low", "high", "p_value")


def evaluate_senders(
    access: FactorAccess,
    receivers: Mapping[str, Int64[np.ndarray, " cells"]],
    usable: Mapping[str, Int64[np.ndarray, " cells"]],
    outputs: HeadOutputs,
    batches: Sequence[tuple[int, ...]],
    tiles: Int64[np.ndarray, " all_cells"],
    *,
    n_tiles: int,
    test: PermutationSpec,
    progress: Callable[[int], None] | None = None,
) -> Senders:
    """Learn what each head takes from each type of sender, in each type of receiver.

    Notes
    -----
    What is masked and what is not are two models of the same cells: the interval and p of their difference come from
    :func:`~amici_eval.stats.tiles.paired.paired_differences`, on the same tiles, resamples and flips for all senders.
    """
    types, n_heads = tuple(receivers), access.card.n_heads
    found = _SenderLosses.empty((n_heads, len(types), len(access.card.cell_types)), len(access.card.genes), n_tiles)
    reasons: dict[tuple[str, str], str] = {}
    sums = outputs.by_sender
    assert sums is not None  # noqa: S101, RUF100 - the first batch was asked for
    codes = {cell_type: access.card.cell_types.index(cell_type) for cell_type in types}
    everyone = np.concatenate(list(usable.values()))
    for number, batch in enumerate(batches):
        brought = outputs if number == 0 else access.attend(everyone, without_senders=batch)
        assert brought.without_senders is not None  # noqa: S101, RUF100 - it was asked for
        start = 0
        for cell_type, rows in usable.items():
            own = slice(start, start + len(rows))
            start += len(rows)
            near = [place for place, code in enumerate(batch) if sums.n_receivers[codes[cell_type], code]]
            of_type = [brought.whole[own], *(brought.without_senders[place, own] for place in near)]
            reason = found.fill(
                types.index(cell_type),
                [batch[place] for place in near],
                _moments(access, cell_type, rows, of_type, tiles[own]) if near else None,
                test=test,
                label=cell_type,
            )
            if reason is not None:
                reasons[cell_type, ""] = reason
            if progress is not None:
                progress(len(rows) * len(batch))
        del brought
    receiver_codes = [codes[cell_type] for cell_type in types]
    n_cells = np.array([len(usable.get(cell_type, ())) for cell_type in types], dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        attention = (sums.attention[receiver_codes] / n_cells[:, None, None]).transpose(2, 0, 1)
        coefficient = (sums.coefficient[receiver_codes] / sums.attention[receiver_codes]).transpose(2, 0, 1)
        distance = log(10.0) / coefficient
    n_receivers = sums.n_receivers[receiver_codes]
    for at, cell_type in enumerate(types):
        if cell_type not in usable:
            reasons[cell_type, ""] = _TOO_FEW.format(len(receivers[cell_type]))
            continue
        for code, sender in enumerate(access.card.cell_types):
            if not n_receivers[at, code]:
                reasons[cell_type, sender] = _NO_SUCH
    return found.result(
        senders=access.card.cell_types,
        test=test,
        n_receivers=n_receivers,
        attention=attention,
        distance=np.where(np.isfinite(distance), distance, np.nan),
        reasons=tuple((cell_type, sender, why) for (cell_type, sender), why in reasons.items()),
    )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _SenderLosses:
    """Arrays that are filled type after type: over all genes, shape (H, C, S), of each gene, and of each tile."""

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
        moments: MaskedMoments | None,
        *,
        test: PermutationSpec,
        label: str,
    ) -> str | None:
        """Fill in what holds for a receiver type without each of some senders; return why something has no value."""
        if moments is None:
            return None
        if not moments.varies.any():
            return f"no gene varies over the {moments.n_cells.sum()} cells"
        # where the outputs of a head are no numbers, the others keep their resamples
        finite = np.isfinite(moments.residual_m2).all(axis=(0, 1, 3))
        heads = np.flatnonzero(finite & np.isfinite(moments.residual_mean).all(axis=(0, 1, 3)))
        reason = "the predictions of some heads are not finite" if len(heads) < len(finite) else None
        cells = moments.n_cells.astype(np.float64)
        squares = [
            squares_about(cells, mean[:, heads], m2[:, heads]).sum(axis=2).T
            for mean, m2 in zip(moments.residual_mean, moments.residual_m2, strict=True)
        ]
        for model, sender in enumerate(senders, start=1):
            pair = PairedRows(
                tiles=moments.tiles,
                n_cells=moments.n_cells,
                target_mean=moments.target_mean,
                target_m2=moments.target_m2,
                before_mean=moments.residual_mean[model][:, heads],
                before_m2=moments.residual_m2[model][:, heads],
                after_mean=moments.residual_mean[0][:, heads],
                after_m2=moments.residual_m2[0][:, heads],
                varies=moments.varies,
            )
            difference = paired_differences(
                pair,
                confidence=test.confidence,
                n_resamples=max(1, test.n_bootstrap),
                n_flips=_N_FLIPS,
                seed=test.seed,
                label=label,
            )
            place = (heads, at, sender)
            lost = np.zeros((len(heads), self.lost_squares.shape[-1]))
            lost[:, moments.tiles] = squares[model] - squares[0]
            self.lost_squares[place] = lost
            self.overall["effect"][place] = difference.difference
            self.overall["p_value"][place] = difference.p_value
            self.genes["effect"][place] = difference.difference_gene
            self.genes["p_value"][place] = difference.p_value_gene
            if test.n_bootstrap:
                between = gene_intervals(pair, confidence=test.confidence)
                self.overall["low"][place], self.overall["high"][place] = difference.low, difference.high
                self.genes["low"][place], self.genes["high"][place] = between.low, between.high
            reason = difference.reason or reason
        return reason if test.n_bootstrap else reason or "no interval: permutation.n_bootstrap=0"

    def result(self, *, senders: tuple[str, ...], test: PermutationSpec, **others: Any) -> Senders:
        # without permutations shared by all there is no maxT; Holm controls the same error under any dependence
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


def _moments(
    access: FactorAccess,
    cell_type: str,
    rows: Int64[np.ndarray, " cells"],
    outputs: Sequence[Float32[np.ndarray, "cells outputs"]],
    tiles: Int64[np.ndarray, " cells"],
) -> MaskedMoments:
    return over_blocks(
        lambda blocks: masked_moments(
            outputs, access.readout(cell_type), blocks, tiles=tiles, device=access.statistics_device
        ),
        lambda: access.expression_blocks(rows),
        what="moments with senders masked out",
        device=access.statistics_device,
    )
