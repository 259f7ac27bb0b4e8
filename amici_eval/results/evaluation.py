"""The results of an evaluation, written as JSON and read back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from amici_eval.common.errors import DataError
from amici_eval.common.files import check_names
from amici_eval.results import frames
from amici_eval.results.analyses import Baselines, HeadAblations, HeldOutParts, Intervals, Senders, SpatialTests
from amici_eval.results.codec import Record, load_result, read_result, save_result
from amici_eval.results.frames import (
    ABLATION_COLUMNS,
    GENE_COLUMNS,
    HEAD_COLUMNS,
    HELD_OUT_COLUMNS,
    INTERACTION_COLUMNS,
    SCALE_COLUMNS,
    SENDER_COLUMNS,
    SENDER_GENE_COLUMNS,
)
from amici_eval.results.moments import MOMENTS_FILE, Moments
from amici_eval.settings.evaluation import ENGINES, SAMPLINGS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from jaxtyping import Float64, Int64

    from amici_eval.settings.evaluation import EvaluationSpec

__all__ = [
    "ABLATION_COLUMNS",
    "GENE_COLUMNS",
    "HEAD_COLUMNS",
    "HELD_OUT_COLUMNS",
    "INTERACTION_COLUMNS",
    "SCALE_COLUMNS",
    "SCHEMA_VERSION",
    "SENDER_COLUMNS",
    "SENDER_GENE_COLUMNS",
    "Baselines",
    "HeadAblations",
    "HeadEvaluation",
    "HeldOutParts",
    "Intervals",
    "Senders",
    "SpatialTests",
    "Undefined",
]

SCHEMA_VERSION = 4
FILE_NAME = "evaluation.json"
_DRAWN = (*SAMPLINGS, "sequential", "gpd", "moments")


@dataclass(frozen=True, kw_only=True)
class Undefined(Record):
    """A number that does not exist, and why.

    Parameters
    ----------
    cell_type
        Receiver cell type.
    reason
        In words, with the count or value that decided it.
    head
        Attention head; ``None`` means all of them.
    gene
        ``None`` means that it is not about one gene.
    """

    cell_type: str
    reason: str
    head: int | None = None
    gene: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadEvaluation(Record):
    """How much each attention head, kept alone, explains of each receiver cell type, and how sure that is.

    Parameters
    ----------
    n_heads
        Number of heads H; heads are numbered from 0 as in the model.
    cell_types
        The C types with evaluated cells, sorted.
    genes
        The G genes in the model's order.
    n_cells
        Evaluated cells per type, shape (C,).
    expl_var_gene
        Explained variance per head, type and gene, shape (H, C, G); NaN where undefined.
    expl_var
        The same aggregated over genes, shape (H, C).
    expl_var_full, expl_var_none
        Aggregated explained variance of the unablated model and of the model without any head, shape (C,).
    exceedances
        Permutations at least as extreme as the truth, shape (H, C); -1 where there is no test.
    n_permutations
        Random permutations per type, where they are drawn independently.
    p_value, p_value_adj, p_ci_low, p_ci_high
        Shape (H, C), free null; NaN where undefined.
    held_out
        Per type: ``True`` if none of its evaluated cells was used to fit the model, ``False`` if some were, ``None``
        if that is not known.
    spec
        The settings that produced the numbers.
    undefined
        What has no value, and why.
    notes
        Warnings and remarks on model and data, to be shown with the numbers.
    model, data
        What was evaluated on what (names, versions, digests), as plain values.
    engine
        What produced the numbers: ``factored`` or ``hooked``.
    parity
        Largest absolute difference between the predictions of both engines on a sample of cells; ``None`` if they
        were not compared, NaN if the difference is no finite number.
    parity_cells
        Cells of that sample.
    n_permutations_by_type
        Permutations of each type, shape (C,); ``None``: ``n_permutations`` everywhere.
    sampling
        How each type's free p-values came about: from ``independent`` permutations, ``cyclic`` ones (all cyclic shifts
        of one random order), ``sequential`` (stopped early), ``gpd`` (a tail fitted to independent ones), ``moments``
        (none drawn), or empty if it has no test; ``()``: independent everywhere.
    ablations
        The other ways to take heads away; ``None`` if they were not computed.
    spatial
        Tests that hold in tissue; ``None`` if it is not known where cells lie, or they were not asked for.
    intervals
        Confidence intervals of explained variance; ``None`` likewise.
    parts
        In-sample and held-out cells side by side; ``None`` if it is not known which cells the model was fitted on.
    trivial
        Predictors that know no head; ``None`` if they were not computed.
    senders
        Who talks to whom, per head; ``None`` if it was not computed.
    moments
        Moments per tile and a sketch of the heads, from the factored engine; kept in a file of their own, not in JSON.
    schema_version
        Of this record.

    Raises
    ------
    ValueError
        If the engine or a sampling is unknown, what is given per type or head has another size, or the moments are
        of other heads, types or genes.
    """

    sized_by: ClassVar[Mapping[str, str | int]] = {"heads": "n_heads", "types": "cell_types", "genes": "genes"}
    apart: ClassVar[tuple[str, ...]] = ("moments",)

    schema_version: int = SCHEMA_VERSION
    n_heads: int
    cell_types: tuple[str, ...]
    genes: tuple[str, ...]
    n_permutations: int
    held_out: tuple[bool | None, ...]
    spec: EvaluationSpec
    undefined: tuple[Undefined, ...] = ()
    notes: tuple[str, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "hooked"
    parity: float | None = None
    parity_cells: int = 0
    n_permutations_by_type: Int64[np.ndarray, " types"] | None = None
    sampling: tuple[str, ...] = ()
    ablations: HeadAblations | None = None
    spatial: SpatialTests | None = None
    intervals: Intervals | None = None
    parts: HeldOutParts | None = None
    trivial: Baselines | None = None
    senders: Senders | None = None
    n_cells: Int64[np.ndarray, " types"]
    expl_var_gene: Float64[np.ndarray, "heads types genes"]
    expl_var: Float64[np.ndarray, "heads types"]
    expl_var_full: Float64[np.ndarray, " types"]
    expl_var_none: Float64[np.ndarray, " types"]
    exceedances: Int64[np.ndarray, "heads types"]
    p_value: Float64[np.ndarray, "heads types"]
    p_value_adj: Float64[np.ndarray, "heads types"]
    p_ci_low: Float64[np.ndarray, "heads types"]
    p_ci_high: Float64[np.ndarray, "heads types"]
    moments: Moments | None = None

    def __post_init__(self) -> None:
        n_types = len(self.cell_types)
        if self.engine not in ENGINES:
            msg = f"engine {self.engine!r} must be one of {ENGINES!r}"
            raise ValueError(msg)
        if (self.sampling and len(self.sampling) != n_types) or not set(self.sampling) <= {*_DRAWN, ""}:
            msg = f"sampling {self.sampling!r} must be (), or some of {_DRAWN!r} or empty for {n_types} types"
            raise ValueError(msg)
        by_type = self.n_permutations_by_type
        if by_type is not None and by_type.shape != (n_types,):
            msg = f"n_permutations_by_type has shape {by_type.shape} for {n_types} cell types"
            raise ValueError(msg)
        for one in (self.ablations, self.spatial, self.intervals, self.parts, self.trivial, self.senders):
            if one is not None:
                one.check(self.sizes_in(vars(self)))
        if self.moments is not None and (difference := self._difference(self.moments)):
            msg = f"moments: {difference}"
            raise ValueError(msg)

    def __repr__(self) -> str:
        name = " ".join(str(self.model[key]) for key in ("name", "version") if self.model.get(key))
        return (
            f"HeadEvaluation({name + ': ' if name else ''}{self.n_heads} heads x {len(self.cell_types)} cell types x "
            f"{len(self.genes)} genes, {self.n_significant} of {self.n_decided} tests significant)"
        )

    @property
    def n_tests(self) -> int:
        """Number of defined tests: the family of the adjustment."""
        return int(np.count_nonzero(~np.isnan(self.p_value)))

    @property
    def n_significant_free(self) -> int:
        """Number of head x type pairs with an adjusted p-value of at most alpha under the free null."""
        return int(np.count_nonzero(self.p_value_adj <= self.spec.permutation.alpha))

    @property
    def n_significant(self) -> int:
        """Number of head x type pairs that are significant: by the spatial null where it was tested, else the free."""
        return int(np.count_nonzero(self.adjusted <= self.spec.permutation.alpha))

    @property
    def decided_by(self) -> str:
        """The null that decides what is significant: the spatial one if it was tested, else ``free``."""
        return self.spec.permutation.null if self.spatial is None else self.spatial.null

    @property
    def adjusted(self) -> Float64[np.ndarray, "heads types"]:
        """Adjusted p-values of the null that decides, shape (H, C); NaN where it has no test."""
        return self.p_value_adj if self.spatial is None else self.spatial.p_value_adj

    @property
    def n_decided(self) -> int:
        """Number of head x type pairs with a test of the null that decides."""
        return int(np.count_nonzero(~np.isnan(self.adjusted)))

    @property
    def n_undefined(self) -> int:
        """Number of head x type pairs that have no test."""
        return self.p_value.size - self.n_tests

    def type_index(self, cell_type: str) -> int:
        """Return the position of a cell type, or say which there are."""
        try:
            return self.cell_types.index(cell_type)
        except ValueError:
            raise DataError(
                value=f"cell type {cell_type!r}",
                rule=f"the evaluation holds {', '.join(self.cell_types)}",
                fix="choose one of these",
            ) from None

    def best_head(self, cell_type: str) -> int:
        """Return the head that explains one gene of a receiver type best.

        Parameters
        ----------
        cell_type
            One of ``cell_types``.

        Raises
        ------
        DataError
            If the type was not evaluated, or explained variance is undefined for all of its heads and genes.

        Notes
        -----
        The head with the largest explained variance of any gene, as AMICI defines it; the winner of many genes is
        optimistic, so read it beside ``heads()``.
        """
        best = _nan_max(self.expl_var_gene[:, self.type_index(cell_type)])
        if np.all(np.isnan(best)):
            raise DataError(
                value=f"cell type {cell_type!r} has no defined explained variance",
                rule="a best head needs at least one defined gene",
                fix="choose a type with more cells; heads() gives the reason",
            )
        return int(np.nanargmax(best))

    def to_frame(self) -> pd.DataFrame:
        """Return a row per head x type x gene: the reference's seven columns, then per-gene p-values and reasons."""
        return frames.genes_frame(self)

    def heads(self) -> pd.DataFrame:
        """Return a row per head x type: effect, best gene, p-values, decision, reasons."""
        return frames.heads_frame(self)

    def baselines(self) -> pd.DataFrame:
        """Return explained variance of the whole model, of the model without heads, and of predictors without any."""
        return frames.baselines_frame(self)

    def held_out_frame(self) -> pd.DataFrame:
        """Return a row per head x type with in-sample and held-out explained variance side by side.

        Notes
        -----
        Head ``full`` is the whole model. No rows if it is not known which cells the model was fitted on.
        """
        return frames.held_out_frame(self)

    def scales_frame(self) -> pd.DataFrame:
        """Return a row per head x type x tile width: p where cells are shuffled within tiles of that width."""
        return frames.scales_frame(self)

    def ablations_frame(self) -> pd.DataFrame:
        """Return a row per head x type x mode of :class:`HeadAblations`, none if they were not computed.

        Notes
        -----
        ``delta_full`` is what the whole model explains more than the ablated one; NaN for Shapley values.
        """
        return frames.ablations_frame(self)

    def interactions_frame(self) -> pd.DataFrame:
        """Return a row per pair of heads (``head_a < head_b``) and type, none if ablations were not computed.

        Notes
        -----
        Above 0 two heads explain more together than the sum of what each adds, below 0 they explain partly the same.
        """
        return frames.interactions_frame(self)

    def senders_frame(self) -> pd.DataFrame:
        """Return a row per head x receiver type x sender type: attention, what is lost without the sender, distance."""
        return frames.senders_frame(self)

    def sender_genes_frame(self) -> pd.DataFrame:
        """Return a row per head x receiver type x sender type x gene: what is lost without the sender.

        Notes
        -----
        No rows if senders were not computed, or the evaluation was read back: single genes are in
        ``tables/sender_genes.parquet`` of the run.
        """
        return frames.sender_genes_frame(self)

    def to_json(self) -> str:
        """Return the whole evaluation as JSON text; undefined numbers are ``null``."""
        return json.dumps(self.to_record(), allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_record(cls, record: Mapping[str, Any], sizes: Mapping[str, int]) -> HeadEvaluation:
        """Read what :meth:`to_record` gave, in this version or an earlier one."""
        record = _as_written_now(record)
        for name in ("cell_types", "genes"):
            # an AnnData in memory may have any names
            check_names(record[name], name, printable=False)
        n_types, n_heads = len(record["cell_types"]), record["n_heads"]
        if len(record["held_out"]) != n_types:
            msg = f"held_out has {len(record['held_out'])} entries for {n_types} cell types"
            raise ValueError(msg)
        made = super().from_record({name: record[name] for name in _WRITTEN}, sizes)
        if not all(one.head is None or 0 <= one.head < max(n_heads, 1) for one in made.undefined):
            msg = f"undefined holds heads beyond {n_heads}"
            raise ValueError(msg)
        # JSON has no NaN: a parity that is no finite number is None although cells were compared
        compared = made.parity is None and made.parity_cells
        return replace(made, schema_version=SCHEMA_VERSION, parity=math.nan if compared else made.parity)

    @classmethod
    def from_json(cls, text: str | bytes) -> HeadEvaluation:
        """Read what :meth:`to_json` wrote, in this version or an earlier one.

        Raises
        ------
        DataError
            If the text is no evaluation, or of a newer schema than this version reads.
        """
        return read_result(
            cls, text, what="an evaluation", file_name=FILE_NAME, newest=SCHEMA_VERSION, redo="evaluate again"
        )

    def save(self, directory: str | Path) -> Path:
        """Write the evaluation into a folder (made if missing) and return the file; moments come beside it.

        Notes
        -----
        Moments that lie there are removed first, so that those of another evaluation never stay.
        """
        beside = Path(directory) / MOMENTS_FILE
        beside.unlink(missing_ok=True)
        path = save_result(directory, FILE_NAME, self.to_json())
        if self.moments is not None:
            self.moments.save(beside)
        return path

    @classmethod
    def load(cls, directory: str | Path) -> HeadEvaluation:
        """Read what :meth:`save` wrote, with the moments if they lie beside it.

        Raises
        ------
        DataError
            If the folder holds no evaluation or a damaged one, or moments of another one.
        """
        evaluation = load_result(directory, FILE_NAME, cls.from_json)
        beside = Path(directory) / MOMENTS_FILE
        if not beside.is_file():
            return evaluation
        moments = Moments.load(beside)
        if difference := evaluation._difference(moments):
            raise DataError(
                value=f"{beside} does not fit {FILE_NAME} ({difference})",
                rule="both must be of one evaluation",
                fix=f"download both files of the run again, or remove {MOMENTS_FILE}",
            )
        return replace(evaluation, moments=moments)

    def _difference(self, moments: Moments) -> str | None:
        """Return how moments differ from this evaluation; ``None`` if they fit."""
        if moments.n_heads != self.n_heads:
            return f"{moments.n_heads} heads, not {self.n_heads}"
        for what, theirs, ours in (
            ("cell types", moments.cell_types, self.cell_types),
            ("genes", moments.genes, self.genes),
        ):
            if theirs != ours:
                pairs = ((one, other) for one, other in zip_longest(theirs, ours) if one != other)
                one, other = next(pairs)
                return f"{len(theirs)} {what}, the evaluation has {len(ours)}; first difference: {one!r}, not {other!r}"
        return None


def _nan_max(values: Float64[np.ndarray, "heads genes"]) -> Float64[np.ndarray, " heads"]:
    """Return the maximum over genes; NaN, without a warning, where all are NaN."""
    filled = np.where(np.isnan(values), -np.inf, values).max(axis=1)
    return np.where(np.isinf(filled), np.nan, filled)


_WRITTEN = tuple(entry.name for entry in fields(HeadEvaluation) if entry.name not in HeadEvaluation.apart)
# what a schema version added; evaluations of version 1 were all hooked, with independent permutations
_ADDED: dict[int, dict[str, Any]] = {
    2: {
        "engine": "hooked",
        "parity": None,
        "parity_cells": 0,
        "n_permutations_by_type": None,
        "sampling": [],
        "ablations": None,
    },
    3: dict.fromkeys(("spatial", "intervals", "parts", "trivial")),
    4: {"senders": None},
}
# today's default settings would claim that these were computed
_ADDED_SETTINGS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"ablation": {"modes": ["keep_one"]}},
    3: {
        "permutation": {"spatial_null": "none", "n_bootstrap": 0},
        "ablation": {"baselines": False, "without_nearest": False},
    },
}


def _as_written_now(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the record of an evaluation of any schema version with what later versions added."""
    for version in range(record["schema_version"] + 1, SCHEMA_VERSION + 1):
        groups = _ADDED_SETTINGS.get(version, {})
        spec = {**record["spec"], **{name: {**added, **record["spec"][name]} for name, added in groups.items()}}
        record = {**_ADDED[version], **record, "spec": spec}
    return record
