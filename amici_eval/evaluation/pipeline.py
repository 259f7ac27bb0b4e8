"""Evaluate the heads of a model on a tissue."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.errors import DataError
from amici_eval.common.threads import check_compiler
from amici_eval.evaluation.all_types import evaluate_types
from amici_eval.evaluation.head_tests import adjusted_free, spatial_tests
from amici_eval.evaluation.one_type import TypeSettings
from amici_eval.evaluation.protocols import FactorAccess, LocatedAccess, Progress
from amici_eval.evaluation.tiles import held_out_parts, intervals
from amici_eval.results.analyses import HeadAblations
from amici_eval.results.evaluation import HeadEvaluation
from amici_eval.settings.evaluation import EvaluationSpec, default_n_permutations

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from anndata import AnnData

    from amici_eval.evaluation.all_types import FinishedParts, Types
    from amici_eval.evaluation.launching import Launcher
    from amici_eval.evaluation.one_type import TypeEvaluation
    from amici_eval.model.engines.hooked import ModelAccess
    from amici_eval.settings.evaluation import PermutationSpec

__all__ = ["Parity", "Progress", "check_parity", "evaluate", "evaluate_access"]

PARITY_CELLS = 2
"""Cells of each type on which both engines are compared."""
PARITY_ROUNDING, PARITY_SHARE = 1e-5, 1e-3
"""Tolerance as shares of the largest prediction and of the largest difference that heads make to one."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Difference between the predictions of the factored and the hooked engine on some cells.

    ``largest_difference``: over cells, genes and ablations (each head alone, all, none), None if nothing was compared,
    infinite if only one engine is finite somewhere. ``scale``: largest absolute prediction; ``signal``: largest
    difference that the heads make to a prediction.
    """

    largest_difference: float | None = None
    scale: float = 0.0
    signal: float = 0.0
    n_cells: int = 0

    @property
    def tolerance(self) -> float:
        """Allowed difference: float32 rounding plus a thousandth of the heads' signal."""
        return PARITY_ROUNDING * self.scale + PARITY_SHARE * self.signal

    @property
    def holds(self) -> bool:
        """Whether the engines agree."""
        return self.largest_difference is None or self.largest_difference <= self.tolerance

    @property
    def complaint(self) -> str:
        """The note for the result if the engines disagree."""
        return (
            f"evaluated by the hooked engine: the factored engine's predictions differ from it by up to "
            f"{self.largest_difference:.3g} on {self.n_cells} cells (tolerance {self.tolerance:.3g})"
        )


def check_parity(access: FactorAccess, receivers: Mapping[str, np.ndarray]) -> Parity:
    """Compare both engines on a few cells of every type, under every ablation that the test uses."""
    rows = np.concatenate(
        [
            members[np.linspace(0, len(members) - 1, min(PARITY_CELLS, len(members))).astype(np.int64)]
            for members in receivers.values()
        ]
        or [np.zeros(0, dtype=np.int64)]
    )
    if not len(rows):
        return Parity()
    keeps = [*((head,) for head in range(access.card.n_heads)), None, ()]
    here, there = access.predict(rows, keeps=keeps), access.predict_literally(rows, keeps=keeps)
    both = np.isfinite(here) & np.isfinite(there)
    if not np.array_equal(np.isfinite(here), np.isfinite(there)):
        return Parity(largest_difference=float("inf"), n_cells=len(rows))
    of_heads = np.where(both[-2] & both[-1], there[-2] - there[-1], 0.0)
    return Parity(
        largest_difference=float(np.abs(np.where(both, here, 0.0) - np.where(both, there, 0.0)).max()),
        scale=float(np.abs(np.where(both, there, 0.0)).max()),
        signal=float(np.abs(of_heads).max()),
        n_cells=len(rows),
    )


logger = logging.getLogger(__name__)


def evaluate(
    model: Any,
    adata: AnnData | None = None,
    spec: EvaluationSpec | None = None,
    *,
    progress: Progress | None = None,
    model_info: Mapping[str, Any] | None = None,
    data_info: Mapping[str, Any] | None = None,
    launcher: Launcher | None = None,
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
    launcher
        Evaluates the cell types in other processes, see :func:`amici_eval.open_launcher`; the numbers are
        the same. ``None``: all is done here.

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
    from amici_eval.data.tissue import prepare
    from amici_eval.model.cards import card_of
    from amici_eval.model.engines.opening import open_access, resolve_device

    spec = spec or EvaluationSpec()
    if adata is None:
        adata = getattr(model, "adata", None)
        if adata is None:
            raise DataError(
                value="no data was given",
                rule="a model loaded from MLflow holds no AnnData",
                fix="call evaluate(model, adata)",
            )
    check_compiler()
    resolve_device(spec.ablation.device)
    tissue = prepare(adata, card_of(model, adata=adata, trained_on=spec.data.trained_on), spec.data)
    with open_access(model, tissue, spec.ablation) as access:
        return evaluate_access(
            access, spec, progress=progress, model_info=model_info, data_info=data_info, launcher=launcher
        )


def evaluate_access(
    access: ModelAccess,
    spec: EvaluationSpec,
    *,
    progress: Progress | None = None,
    model_info: Mapping[str, Any] | None = None,
    data_info: Mapping[str, Any] | None = None,
    launcher: Launcher | None = None,
    parts: FinishedParts | None = None,
) -> HeadEvaluation:
    """Evaluate anything that offers :class:`~amici_eval.model.engines.hooked.ModelAccess`; see :func:`evaluate`.

    An access that offers :class:`~amici_eval.evaluation.protocols.FactorAccess` is first checked against its own hooked
    engine on some cells of each type; if they disagree, the hooked engine is used. Without coordinates
    (:class:`~amici_eval.evaluation.protocols.LocatedAccess`) there are neither spatial tests nor intervals. With
    ``parts``, finished parts are kept, and those found are not computed again.
    """
    receivers = access.receivers()
    _check_sections_known(access, spec)
    engine = _checked_engine(access, receivers)
    modes = spec.ablation.modes_of(engine.name)
    notes = [*access.notes, *engine.notes]
    left_out = [mode for mode in spec.ablation.modes_of(spec.ablation.engine) if mode not in modes]
    if left_out:
        notes.append(f"not computed, for it needs the factored engine: {', '.join(left_out)}")
    _warn(notes[len(access.notes) :])
    access, test = engine.access, spec.permutation
    n_permutations = test.n_permutations or default_n_permutations(access.card.n_heads, len(receivers), test.alpha)
    settings = TypeSettings(test=test, n_permutations=n_permutations, modes=modes)
    found = evaluate_types(access, receivers, spec, settings, progress=progress, launcher=launcher, parts=parts)
    not_finite = _not_finite(receivers, found)
    _warn(not_finite)
    _warn_of_undefined(found)
    return HeadEvaluation(
        n_heads=access.card.n_heads,
        cell_types=tuple(receivers),
        genes=access.card.genes,
        n_cells=np.array([len(rows) for rows in receivers.values()], dtype=np.int64),
        n_permutations=n_permutations,
        held_out=found.held_out,
        spec=spec,
        undefined=tuple(found.undefined),
        notes=(*notes, *found.notes, *not_finite),
        model=dict(model_info or {}),
        data=dict(data_info or {}),
        engine=engine.name,
        parity=engine.parity.largest_difference,
        parity_cells=engine.parity.n_cells,
        ablations=_ablations(found.evaluated, modes, access.card.n_heads),
        trivial=found.trivial,
        senders=found.senders,
        moments=found.moments,
        **_explained(found, access),
        **_free_tests(found, access, test),
        **_spatial_and_intervals(receivers, found, access, test),
    )


@dataclass(frozen=True, kw_only=True)
class _Engine:
    """The engine that evaluates, and how it was checked."""

    access: ModelAccess
    name: str = "hooked"
    parity: Parity = Parity()
    notes: tuple[str, ...] = ()


def _checked_engine(access: ModelAccess, receivers: Mapping[str, np.ndarray]) -> _Engine:
    """Return the factored engine if it agrees with the hooked one, else the hooked one."""
    if not isinstance(access, FactorAccess):
        return _Engine(access=access)
    parity = check_parity(access, receivers)
    if parity.holds:
        return _Engine(access=access, name="factored", parity=parity)
    return _Engine(access=access.hooked, parity=parity, notes=(parity.complaint,))


def _warn(notes: Sequence[str]) -> None:
    for note in notes:
        logger.warning("%s", note)


def _not_finite(types: Iterable[str], found: Types) -> list[str]:
    return [
        f"{cell_type}: ablations are undefined, for outputs of heads {', '.join(map(str, item.not_finite))} are not "
        "finite"
        for cell_type, item in zip(types, found.evaluated, strict=True)
        if item is not None and item.not_finite
    ]


def _warn_of_undefined(found: Types) -> None:
    """Warn of types and heads without a value; genes are too many to name."""
    for one in found.undefined:
        if one.gene is None:
            where = "all heads" if one.head is None else f"head {one.head}"
            logger.warning("undefined for %s, %s: %s", one.cell_type, where, one.reason)


def _explained(found: Types, access: ModelAccess) -> dict[str, Any]:
    """Return explained variance by its field of the result."""
    n_heads, evaluated = access.card.n_heads, found.evaluated
    by_gene = [None if item is None else item.expl_var_gene for item in evaluated]
    return {
        "expl_var_gene": _stack(by_gene, (n_heads, len(access.card.genes))),
        "expl_var": _stack([None if item is None else item.expl_var for item in evaluated], (n_heads,)),
        "expl_var_full": np.array([np.nan if item is None else item.full for item in evaluated]),
        "expl_var_none": np.array([np.nan if item is None else item.none for item in evaluated]),
    }


def _free_tests(found: Types, access: ModelAccess, test: PermutationSpec) -> dict[str, Any]:
    """Return the free tests by their field of the result."""
    free, shape = [None if item is None else item.free for item in found.evaluated], (access.card.n_heads,)
    p = _stack([None if one is None else one.p for one in free], shape)
    return {
        "exceedances": _stack([None if one is None else one.exceedances for one in free], shape, fill=-1),
        "p_value": p,
        "p_value_adj": adjusted_free(p, free, test),
        "p_ci_low": _stack([None if one is None else one.p_low for one in free], shape),
        "p_ci_high": _stack([None if one is None else one.p_high for one in free], shape),
        "n_permutations_by_type": np.array([0 if one is None else one.n_permutations for one in free], dtype=np.int64),
        "sampling": tuple("" if one is None else one.method for one in free),
    }


def _spatial_and_intervals(
    types: Iterable[str], found: Types, access: ModelAccess, test: PermutationSpec
) -> dict[str, Any]:
    """Return what needs tiles of tissue, by its field of the result; nothing without coordinates."""
    if found.tile_width is None:
        return {}
    n_heads, by_type = access.card.n_heads, dict(zip(types, found.evaluated, strict=True))
    fields: dict[str, Any] = {}
    if test.spatial_null != "none":
        spatial = {name: None if item is None else item.spatial for name, item in by_type.items()}
        fields["spatial"] = spatial_tests(spatial, test=test, n_heads=n_heads, n_genes=len(access.card.genes))
    if test.n_bootstrap:
        fields["intervals"] = intervals(by_type, test=test, n_heads=n_heads, tile_width=found.tile_width)
    # sums are split into cells in-sample and held out only if it is known which are which
    if access.fitted is not None:
        fields["parts"] = held_out_parts(by_type, test=test, n_heads=n_heads)
    return fields


def _check_sections_known(access: ModelAccess, spec: EvaluationSpec) -> None:
    if spec.permutation.spatial_null == "sample" and isinstance(access, LocatedAccess):
        rows = next(iter(access.receivers().values()), np.zeros(0, dtype=np.int64))
        if access.samples(rows) is None:
            raise DataError(
                value="permutation.spatial_null=sample without data.sample_key",
                rule="cells are shuffled within sections, so it must be known which section a cell is of",
                fix="set data.sample_key to the column of adata.obs that names it, or permutation.spatial_null=lag",
            )


def _stack(parts: Sequence[np.ndarray | None], shape: tuple[int, ...], fill: float = np.nan) -> np.ndarray:
    """Stack the arrays of the types along the second axis, with a fill value for types without a result."""
    dtype = np.float64 if np.isnan(fill) else np.int64
    empty = np.full(shape, fill, dtype=dtype)
    return np.stack([empty if part is None else part for part in parts], axis=1).astype(dtype)


def _ablations(
    evaluated: Sequence[TypeEvaluation | None], modes: tuple[str, ...], n_heads: int
) -> HeadAblations | None:
    if modes == ("keep_one",):
        return None
    missing, square = np.full(n_heads, np.nan), np.full((n_heads, n_heads), np.nan)

    def of(item: TypeEvaluation | None, name: str, empty: np.ndarray) -> np.ndarray:
        found = None if item is None or item.catalogue is None else getattr(item.catalogue, name)
        return empty if found is None else found

    return HeadAblations(
        modes=modes,
        expl_var=np.stack(
            [
                np.stack([missing if i is None else i.ablations.get(mode, missing) for i in evaluated], axis=1)
                for mode in modes
            ]
        ),
        standard_error=np.stack([of(item, "shapley_standard_error", missing) for item in evaluated], axis=1),
        interaction=np.stack([of(item, "interaction", square) for item in evaluated]),
        frozen_interaction=np.stack([of(item, "frozen_interaction", square) for item in evaluated]),
    )
