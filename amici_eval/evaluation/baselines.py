"""What predictors explain that know no attention head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amici_eval.evaluation.surroundings import (
    DESIGNS,
    FITTED,
    FOLD,
    SCORED,
    TypeDesigns,
    gather,
    sections_of,
    those_that_fit,
)
from amici_eval.results.inference import Baselines
from amici_eval.stats.explained_variance import MIN_CELLS_EXPLAINED_VARIANCE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jaxtyping import Bool, Float64, Int64

    from amici_eval.evaluation.protocols import TissueAccess

__all__ = ["evaluate_baselines"]

MIN_CELLS_FIT = 10
"""Fewer cells to fit tell nothing about any penalty."""
N_FOLDS = 5


def evaluate_baselines(
    access: TissueAccess,
    receivers: Mapping[str, Int64[np.ndarray, " cells"]],
    *,
    expl_var: Float64[np.ndarray, "heads types"],
    expl_var_full: Float64[np.ndarray, " types"],
    fitted: Bool[np.ndarray, " all_cells"] | None,
    without_nearest: Float64[np.ndarray, "models types"] | None = None,
    n_folds: int = N_FOLDS,
    progress: Callable[[int], None] | None = None,
) -> Baselines:
    """Learn what composition, expression of neighbours and position explain without any head, and what heads add.

    Notes
    -----
    Each is a ridge regression of all genes of a type, one penalty a type by generalised cross-validation. ``position``
    takes cosines over the bounding box of the type's cells in a section, lowest frequencies first: one for ten cells to
    fit, at most 64 a section and about 512 in all; each section has a level of its own. A model without heads explains
    0, which counts as a baseline: no gain is larger than what the head itself explains.

    A type has hundreds of weights of its own, so that a fit explains much of its own cells by chance: 19 % of 225
    macrophages in a Xenium section, and less than 1 % of others. Hence the folds. What a model explains of its training
    cells is flattered too, if less: only cells held out from both give a fair gain.
    """
    types = tuple(receivers)
    if expl_var.shape[1:] != (len(types),) or expl_var_full.shape != (len(types),):
        msg = (
            f"expl_var has shape {expl_var.shape}, expl_var_full {expl_var_full.shape}; (heads, {len(types)}) and "
            f"({len(types)},) are needed, a column for each type of receivers"
        )
        raise ValueError(msg)
    if not 1 <= n_folds <= MIN_CELLS_FIT:
        msg = (
            f"n_folds={n_folds}: 1 to {MIN_CELLS_FIT} are possible, for a type is fitted from {MIN_CELLS_FIT} cells on"
        )
        raise ValueError(msg)
    codes, cell_types = access.label_codes, access.card.cell_types
    evaluated = np.isin(codes, [cell_types.index(cell_type) for cell_type in types])
    if fitted is not None and not fitted[evaluated].any():
        fitted = None
    roles = _roles(access, receivers, fitted, n_folds)
    found = np.full((len(DESIGNS), len(types)), np.nan)
    n_fitted = np.bincount(codes[(roles & FITTED) > 0], minlength=len(cell_types))
    usable = [
        index
        for index, (cell_type, rows) in enumerate(receivers.items())
        if n_fitted[cell_types.index(cell_type)] >= MIN_CELLS_FIT and len(rows) >= MIN_CELLS_EXPLAINED_VARIANCE
    ]
    if progress is not None:
        progress(sum(len(rows) for index, rows in enumerate(receivers.values()) if index not in usable))
    sections = sections_of(access)
    designs = [TypeDesigns(access, types[index], index, roles, sections, cross_fitted=n_folds > 1) for index in usable]
    for together in those_that_fit(designs):
        gather(access, together, roles, sections, progress)
        for one in together:
            found[:, one.index] = one.explained()
    defined = np.isfinite(found).any(axis=0)
    best = np.where(defined, np.maximum(np.where(np.isfinite(found), found, 0.0).max(axis=0), 0.0), np.nan)
    if without_nearest is None:
        without_nearest = np.full((len(expl_var) + 1, len(types)), np.nan)
    return Baselines(
        names=DESIGNS,
        fitted_on="all evaluated cells" if fitted is None else "training cells",
        expl_var=found,
        gain=expl_var - best,
        full_gain=expl_var_full - best,
        without_nearest=without_nearest[:-1],
        full_without_nearest=without_nearest[-1],
    )


def _roles(
    access: TissueAccess,
    receivers: Mapping[str, Int64[np.ndarray, " cells"]],
    fitted: Bool[np.ndarray, " all_cells"] | None,
    n_folds: int,
) -> Int64[np.ndarray, " all_cells"]:
    """Return what each cell is for: to fit, to score (bits 1 and 2), or both, plus four times the fold of these."""
    codes, cell_types = access.label_codes, list(access.card.cell_types)
    roles = np.zeros(len(codes), dtype=np.int64)
    for cell_type, rows in receivers.items():
        of_type = codes == cell_types.index(cell_type)
        roles[rows] |= SCORED
        roles[rows if fitted is None else fitted & of_type] |= FITTED
        both = np.flatnonzero(of_type & (roles == (FITTED | SCORED)))
        # by rank of the names, whatever the order of storage
        both = both[np.argsort(np.array(access.cell_names(both), dtype=object), kind="stable")]
        roles[both] += FOLD * (np.arange(len(both)) % n_folds)
    return roles
