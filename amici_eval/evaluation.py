"""Evaluate the heads of a model on a tissue."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.results import HeadEvaluation, Undefined
from amici_eval.specs import EvaluationSpec, default_n_permutations
from amici_eval.stats.explained_variance import MIN_CELLS_EXPLAINED_VARIANCE, explained_variance
from amici_eval.stats.multiplicity import adjust_p_values
from amici_eval.stats.nulls import MIN_CELLS_TEST, permutation_exceedances
from amici_eval.stats.permutations import PermutationStream
from amici_eval.stats.pvalues import p_values

if TYPE_CHECKING:
    from anndata import AnnData

    from amici_eval.model.access import ModelAccess

__all__ = ["Progress", "evaluate", "evaluate_access"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with (work done, work in all, what is being done); work is counted in receiver cells x heads x stages."""


def evaluate(
    model: Any,
    adata: AnnData | None = None,
    spec: EvaluationSpec | None = None,
    *,
    progress: Progress | None = None,
    model_info: Mapping[str, Any] | None = None,
    data_info: Mapping[str, Any] | None = None,
) -> HeadEvaluation:
    """Learn which attention heads explain which receiver cell types and genes, and how sure that is.

    Parameters
    ----------
    model
        What :func:`amici_eval.load_model` returns, or a live, trained ``amici.AMICI`` (or a subclass).
    adata
        The whole tissue; cells are chosen with ``spec.data.subset``, never by cutting the AnnData, so that every cell
        keeps its neighbours. ``None`` takes the AnnData of a live model.
    spec
        Settings; the defaults reproduce the reference's test with valid p-values.
    progress
        Told how far the work is.
    model_info, data_info
        Plain values that name model and data in the result.

    Returns
    -------
    HeadEvaluation
        Explained variance of every head kept alone, with permutation p-values, and the reasons for what is undefined.

    Raises
    ------
    AmiciEvalError
        If model, data or device do not fit; before any long work.

    Notes
    -----
    Nothing that is handed in changes: not the AnnData, not the model (hooks, training flags, device), no random state.
    """
    from amici_eval.errors import DataError
    from amici_eval.model.access import open_access, resolve_device
    from amici_eval.model.checkpoint import card_of
    from amici_eval.tissue import prepare

    spec = spec or EvaluationSpec()
    if adata is None:
        adata = getattr(model, "adata", None)
        if adata is None:
            raise DataError(
                value="no data was given",
                rule="a model loaded from MLflow holds no AnnData",
                fix="call evaluate(model, adata)",
            )
    resolve_device(spec.ablation.device)
    tissue = prepare(adata, card_of(model, adata=adata), spec.data)
    with open_access(model, tissue, spec.ablation) as access:
        return evaluate_access(access, spec, progress=progress, model_info=model_info, data_info=data_info)


def evaluate_access(
    access: ModelAccess,
    spec: EvaluationSpec,
    *,
    progress: Progress | None = None,
    model_info: Mapping[str, Any] | None = None,
    data_info: Mapping[str, Any] | None = None,
) -> HeadEvaluation:
    """Evaluate anything that offers :class:`~amici_eval.model.access.ModelAccess`; see :func:`evaluate`."""
    receivers = access.receivers()
    types, n_heads, genes = tuple(receivers), access.card.n_heads, access.card.genes
    test = spec.permutation
    n_permutations = test.n_permutations or default_n_permutations(n_heads, len(types), test.alpha)
    expl_var_gene = np.full((n_heads, len(types), len(genes)), np.nan)
    expl_var = np.full((n_heads, len(types)), np.nan)
    full, none = np.full(len(types), np.nan), np.full(len(types), np.nan)
    exceedances = np.full((n_heads, len(types)), -1, dtype=np.int64)
    undefined: list[Undefined] = []
    report = _Meter(progress, total=sum(len(rows) for rows in receivers.values()) * (2 * n_heads + 2))

    for index, (cell_type, rows) in enumerate(receivers.items()):
        n_cells = len(rows)
        if n_cells < MIN_CELLS_EXPLAINED_VARIANCE:
            reason = f"{n_cells} cell; explained variance needs at least {MIN_CELLS_EXPLAINED_VARIANCE}"
            undefined.append(Undefined(cell_type=cell_type, reason=reason))
            report.add(n_cells * (2 * n_heads + 2), cell_type)
            continue
        targets = access.expression(rows)
        predictions = access.predict(
            rows,
            keeps=[*((head,) for head in range(n_heads)), None, ()],
            progress=report.per_cell(cell_type),
        )
        for head in range(n_heads):
            fit = explained_variance(predictions[head], targets)
            expl_var_gene[head, index], expl_var[head, index] = fit.per_gene, fit.aggregated
        full[index] = explained_variance(predictions[n_heads], targets).aggregated
        none[index] = explained_variance(predictions[n_heads + 1], targets).aggregated
        undefined += [
            Undefined(
                cell_type=cell_type, gene=gene, reason=f"the gene has one value in all {n_cells} cells of the type"
            )
            for gene, constant in zip(genes, fit.constant_genes, strict=True)
            if constant
        ]
        if n_cells < MIN_CELLS_TEST or fit.constant_genes.all():
            reason = (
                f"{n_cells} cells; a test needs at least {MIN_CELLS_TEST}"
                if n_cells < MIN_CELLS_TEST
                else f"no gene varies over the {n_cells} cells"
            )
            undefined.append(Undefined(cell_type=cell_type, reason=reason))
            report.add(n_cells * n_heads, cell_type)
            continue
        share = report.share(n_cells * n_heads, n_heads * n_permutations, cell_type)
        counts = permutation_exceedances(
            predictions[:n_heads],
            targets,
            stream=PermutationStream(seed=test.seed, cell_type=cell_type, n_cells=n_cells),
            n_permutations=n_permutations,
            device=access.statistics_device,
            progress=share,
        )
        exceedances[:, index] = np.where(counts.dead, -1, counts.exceedances)
        undefined += [
            Undefined(cell_type=cell_type, head=int(head), reason=_why_dead(predictions[head]))
            for head in np.flatnonzero(counts.dead)
        ]

    defined = exceedances >= 0
    raw = p_values(np.where(defined, exceedances, 0), n_permutations=n_permutations, convention=test.convention)
    p = np.where(defined, raw.p, np.nan)
    for item in undefined:
        if item.gene is None:
            where = "all heads" if item.head is None else f"head {item.head}"
            logger.warning("undefined for %s, %s: %s", item.cell_type, where, item.reason)
    held_out = tuple(_held_out(access, rows) for rows in receivers.values())
    return HeadEvaluation(
        n_heads=n_heads,
        cell_types=types,
        genes=genes,
        n_cells=np.array([len(rows) for rows in receivers.values()], dtype=np.int64),
        expl_var_gene=expl_var_gene,
        expl_var=expl_var,
        expl_var_full=full,
        expl_var_none=none,
        exceedances=exceedances,
        n_permutations=n_permutations,
        p_value=p,
        p_value_adj=adjust_p_values(p, method=test.adjustment),
        p_ci_low=np.where(defined, raw.ci_low, np.nan),
        p_ci_high=np.where(defined, raw.ci_high, np.nan),
        held_out=held_out,
        spec=spec,
        undefined=tuple(undefined),
        notes=access.notes,
        model=dict(model_info or {}),
        data=dict(data_info or {}),
    )


def _why_dead(prediction: np.ndarray) -> str:
    if not np.isfinite(prediction).all():
        return "the head's predictions are not finite"
    return "the head predicts the same for all cells (dead head)"


def _held_out(access: ModelAccess, rows: np.ndarray) -> bool | None:
    training = access.card.training_cells
    return None if training is None else training.isdisjoint(access.cell_names(rows))


class _Meter:
    """Adds up work and tells how far it is."""

    def __init__(self, progress: Progress | None, *, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, work: int, what: str) -> None:
        self._done += work
        if self._progress is not None:
            self._progress(self._done, self._total, what)

    def per_cell(self, what: str) -> Callable[[int], None]:
        """Return a callback that adds finished cells."""
        return lambda done: self.add(done, what)

    def share(self, work: int, pieces: int, what: str) -> Callable[[int], None]:
        """Return a callback that spreads ``work`` over ``pieces`` without rounding loss."""
        finished = 0

        def advance(more: int) -> None:
            nonlocal finished
            before = work * finished // pieces
            finished += more
            self.add(work * finished // pieces - before, what)

        return advance
