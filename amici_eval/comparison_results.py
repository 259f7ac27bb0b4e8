"""What a comparison of heads holds: versions side by side, who is whom, what changed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from amici_eval import comparison_frames
from amici_eval.errors import DataError
from amici_eval.named_arrays import NamedArrays

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from jaxtyping import Float64, Int64

__all__ = [
    "COMPARISON_FILE",
    "WHOLE_MODEL",
    "ComparedVersion",
    "FailedVersion",
    "HeadComparison",
    "HeadDifferences",
    "HeadMatches",
    "Lineage",
    "Overall",
]

COMPARISON_FILE = "comparison.json"
SCHEMA_VERSION = 1
WHOLE_MODEL = -1
"""Stands for all heads together where a head is named by its number."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ComparedVersion(NamedArrays):
    """One column of a comparison: a model version on a data set.

    Parameters
    ----------
    label
        Short name, unique within the comparison.
    model, data
        What was evaluated on what, as in the evaluation.
    run_id
        The run that holds the evaluation, if there is one.
    reused
        Whether the evaluation was there already.
    setup
        Hash of the model's training set-up; versions that share it differ in seed and data order only. ``None``: not
        known.
    cell_types
        Of the evaluated cells.
    held_out
        By type, as in the evaluation.
    n_cells
        Shape (C,).
    expl_var, low, high
        Explained variance of each head kept alone, with its interval, shape (H, C).
    p_value_adj
        Of the null that decides, shape (H, C).
    full, full_low, full_high
        The same of the whole model, shape (C,).
    alpha
        Level at which heads are significant.
    decided_by
        The null that decides.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "n_cells": "C",
        "expl_var": "HC",
        "low": "HC",
        "high": "HC",
        "p_value_adj": "HC",
        "full": "C",
        "full_low": "C",
        "full_high": "C",
    }

    label: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    run_id: str | None
    reused: bool
    setup: str | None
    n_heads: int
    cell_types: tuple[str, ...]
    held_out: tuple[bool | None, ...]
    n_cells: Int64[np.ndarray, " types"]
    expl_var: Float64[np.ndarray, "heads types"]
    low: Float64[np.ndarray, "heads types"]
    high: Float64[np.ndarray, "heads types"]
    p_value_adj: Float64[np.ndarray, "heads types"]
    full: Float64[np.ndarray, " types"]
    full_low: Float64[np.ndarray, " types"]
    full_high: Float64[np.ndarray, " types"]
    alpha: float
    decided_by: str

    @property
    def own_sizes(self) -> dict[str, int]:
        """Sizes that the record itself decides."""
        return {"H": self.n_heads, "C": len(self.cell_types)}

    @classmethod
    def sizes_in(cls, values: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes that plain values decide."""
        return {"H": values["n_heads"], "C": len(values["cell_types"])}

    @property
    def n_significant(self) -> int:
        """Number of head x type pairs that are significant."""
        return int(np.count_nonzero(self.p_value_adj <= self.alpha))


@dataclass(frozen=True, kw_only=True)
class FailedVersion:
    """A version that could not be evaluated.

    Parameters
    ----------
    label
        Its name.
    reason
        In words.
    """

    label: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadMatches(NamedArrays):
    """Which head of one version is which head of another.

    Parameters
    ----------
    before, after
        The two versions, as positions in the comparison.
    cell_types, n_genes, n_cells
        Types and genes that both have, and sketched cells: similarity is measured on these.
    similarity
        Correlation of contributions in output space over cells and genes, shape (A, B); A heads of ``before``, B of
        ``after``; between -1 and 1; NaN for dead heads.
    similarity_by_type
        The same within each type, shape (C, A, B).
    partner
        Head of ``after`` that each head of ``before`` is, shape (A,); -1: gone.
    n_permutations
        Permutations behind ``p_value``, and flips behind ``p_value_spatial``.
    p_value
        That a matched similarity this large arises where cells of a type are exchangeable, matching included, shape
        (A,).
    p_value_spatial
        The same where contributions are smooth in space: signs of whole tiles are flipped; shape (A,); NaN without
        tiles enough.
    cka
        Linear centred kernel alignment of what heads bring, shape (A, B).
    divergence
        Mean Jensen-Shannon divergence of attention, in bits, shape (A, B); NaN where no attention was kept.
    profile_cosine
        Cosine of explained variance by gene, shape (A, B).
    reseeded
        Whether both were trained by one set-up.
    reason
        Why there is no spatial p, if that is so.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "similarity": "AB",
        "similarity_by_type": "CAB",
        "partner": "A",
        "p_value": "A",
        "p_value_spatial": "A",
        "cka": "AB",
        "divergence": "AB",
        "profile_cosine": "AB",
    }

    whole_numbers: ClassVar[frozenset[str]] = frozenset({"partner"})

    before: int
    after: int
    cell_types: tuple[str, ...]
    n_genes: int
    n_cells: int
    similarity: Float64[np.ndarray, "before after"]
    similarity_by_type: Float64[np.ndarray, "types before after"]
    partner: Int64[np.ndarray, " before"]
    n_permutations: int
    p_value: Float64[np.ndarray, " before"]
    p_value_spatial: Float64[np.ndarray, " before"]
    cka: Float64[np.ndarray, "before after"]
    divergence: Float64[np.ndarray, "before after"]
    profile_cosine: Float64[np.ndarray, "before after"]
    reseeded: bool
    reason: str | None = None

    @property
    def own_sizes(self) -> dict[str, int]:
        """Sizes that the record itself decides."""
        n_before, n_after = self.similarity.shape
        return {"A": n_before, "B": n_after, "C": len(self.cell_types)}

    @classmethod
    def sizes_in(cls, values: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes that plain values decide."""
        n_before = len(values["partner"])
        n_after = len(values["similarity"][0]) if n_before else 0
        return {"A": n_before, "B": n_after, "C": len(values["cell_types"])}

    @property
    def matched(self) -> Float64[np.ndarray, " before"]:
        """Similarity of each head of ``before`` to its partner; NaN if it is gone."""
        found = np.full(len(self.partner), np.nan)
        has = self.partner >= 0
        found[has] = self.similarity[np.flatnonzero(has), self.partner[has]]
        return found

    @property
    def new(self) -> tuple[int, ...]:
        """Heads of ``after`` that are no head of ``before``."""
        return tuple(sorted(set(range(self.similarity.shape[1])) - set(self.partner.tolist())))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadDifferences(NamedArrays):
    """What changed from one version to the next: matched heads and the whole model, on the same cells.

    Parameters
    ----------
    before, after
        The two versions, as positions in the comparison.
    cell_types, genes
        That both have.
    head_before, head_after
        The matched heads, shape (M,); the last is the whole model, :data:`WHOLE_MODEL` in both.
    difference, low, high
        Explained variance in ``after`` minus that in ``before``, with its interval over tiles, shape (M, C).
    p_value, p_value_adj
        Two-sided, signs of tiles flipped, shape (M, C); adjusted over all of them.
    p_value_equivalence
        That the difference lies outside the margin, shape (M, C): small where versions are the same for all purposes.
    p_value_not_worse
        That ``after`` is worse by the margin or more, shape (M, C).
    n_tiles
        Tiles with cells of the type, shape (C,).
    verdict
        ``better``, ``worse``, ``same`` or ``undecided``, one for each of M x C, row after row.
    difference_gene, p_value_gene, p_value_adj_gene
        Shape (M, C, G), adjusted over all of them; kept in a table of their own, not in JSON.
    reasons
        Why a type has no interval and no p, as ``(ct_name, reason)``.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "head_before": "M",
        "head_after": "M",
        "difference": "MC",
        "low": "MC",
        "high": "MC",
        "p_value": "MC",
        "p_value_adj": "MC",
        "p_value_equivalence": "MC",
        "p_value_not_worse": "MC",
        "n_tiles": "C",
    }
    whole_numbers: ClassVar[frozenset[str]] = frozenset({"head_before", "head_after"})
    apart: ClassVar[tuple[str, ...]] = ("difference_gene", "p_value_gene", "p_value_adj_gene")

    before: int
    after: int
    cell_types: tuple[str, ...]
    genes: tuple[str, ...]
    head_before: Int64[np.ndarray, " matched"]
    head_after: Int64[np.ndarray, " matched"]
    difference: Float64[np.ndarray, "matched types"]
    low: Float64[np.ndarray, "matched types"]
    high: Float64[np.ndarray, "matched types"]
    p_value: Float64[np.ndarray, "matched types"]
    p_value_adj: Float64[np.ndarray, "matched types"]
    p_value_equivalence: Float64[np.ndarray, "matched types"]
    p_value_not_worse: Float64[np.ndarray, "matched types"]
    n_tiles: Int64[np.ndarray, " types"]
    verdict: tuple[str, ...]
    reasons: tuple[tuple[str, str], ...] = ()
    difference_gene: Float64[np.ndarray, "matched types genes"] | None = None
    p_value_gene: Float64[np.ndarray, "matched types genes"] | None = None
    p_value_adj_gene: Float64[np.ndarray, "matched types genes"] | None = None

    @property
    def own_sizes(self) -> dict[str, int]:
        """Sizes that the record itself decides."""
        return {"M": len(self.head_before), "C": len(self.cell_types)}

    @classmethod
    def sizes_in(cls, values: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes that plain values decide."""
        return {"M": len(values["head_before"]), "C": len(values["cell_types"])}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], sizes: Mapping[str, int]) -> HeadDifferences:
        """Read what :meth:`to_record` gave."""
        reasons = tuple((str(name), str(why)) for name, why in record["reasons"])
        made: HeadDifferences = super().from_record({**record, "reasons": []}, sizes)
        return replace(made, reasons=reasons)

    def verdict_of(self, index: int, cell_type: int) -> str:
        """Return the verdict on one matched pair in one cell type."""
        return self.verdict[index * len(self.cell_types) + cell_type]


@dataclass(frozen=True, kw_only=True)
class Overall:
    """What changed from one version to the next in the whole model, all cell types together.

    Parameters
    ----------
    before, after
        The two versions, as positions in the comparison.
    difference, low, high
        Of explained variance over all cells and genes, with its interval over tiles; NaN where undefined.
    p_value, p_value_equivalence, p_value_not_worse
        As in :class:`HeadDifferences`.
    n_tiles
        Tiles with cells.
    verdict
        ``better``, ``worse``, ``same`` or ``undecided``.
    """

    before: int
    after: int
    difference: float
    low: float
    high: float
    p_value: float
    p_value_equivalence: float
    p_value_not_worse: float
    n_tiles: int
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """One head through the versions.

    Parameters
    ----------
    heads
        Its number in each version of the comparison; ``None`` where it is not there.
    stability
        Mean similarity over all pairs of versions, a pair where it is missing counting 0; NaN with one version.
    """

    heads: tuple[int | None, ...]
    stability: float


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadComparison:
    """Heads across versions of a model, or of one version across data sets.

    Parameters
    ----------
    kind
        ``versions``: the same cells, other models; ``datasets``: the same model, other cells.
    versions
        The columns, in order.
    failed
        What could not be evaluated.
    matches
        Of consecutive versions, in order; empty for data sets, where a head is itself.
    differences, overall
        Of consecutive versions, in order.
    lineages
        Heads through all versions.
    similarity
        Between the heads of all pairs of versions, as ``(before, after)`` with ``before < after``.
    floor
        Matched similarities of the heads of two untrained models of this architecture on the same cells, shape
        (heads,): so much alike they are because they read the same neighbourhoods; ``None``: not computed.
    reseeded
        Matched similarities between versions trained by one set-up, shape (any,): how much a retraining alone changes.
    unmatched, margin, alpha, confidence, seed
        Settings.
    cells
        Which cells were compared, in words.
    in_sample
        Whether some version was fitted on some of these cells; ``None``: not known.
    notes
        Remarks.
    schema_version
        Of this record.
    """

    kind: str
    versions: tuple[ComparedVersion, ...]
    failed: tuple[FailedVersion, ...] = ()
    matches: tuple[HeadMatches, ...] = ()
    differences: tuple[HeadDifferences, ...] = ()
    overall: tuple[Overall, ...] = ()
    lineages: tuple[Lineage, ...] = ()
    similarity: Mapping[tuple[int, int], Float64[np.ndarray, "before after"]] = field(default_factory=dict)
    floor: Float64[np.ndarray, " heads"] | None = None
    reseeded: Float64[np.ndarray, " matches"] = field(default_factory=lambda: np.zeros(0))
    unmatched: float = 0.2
    margin: float = 0.01
    alpha: float = 0.05
    confidence: float = 0.95
    seed: int = 0
    cells: str = "all evaluated cells"
    in_sample: bool | None = None
    notes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.kind not in ("versions", "datasets"):
            msg = f"kind {self.kind!r} must be versions or datasets"
            raise ValueError(msg)
        for one in (*self.versions, *self.matches, *self.differences):
            one.check(one.own_sizes)
        pairs = [(one.before, one.after) for one in self.matches]
        pairs += [(one.before, one.after) for one in self.differences]
        pairs += [(one.before, one.after) for one in self.overall]
        for before, after in (*pairs, *self.similarity):
            if not 0 <= before < after < len(self.versions):
                msg = f"pair ({before}, {after}) does not fit {len(self.versions)} versions"
                raise ValueError(msg)

    def __repr__(self) -> str:
        labels = ", ".join(version.label for version in self.versions)
        return f"HeadComparison({labels}: {len(self.lineages)} lineages of heads)"

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(version.label for version in self.versions)

    @property
    def cell_types(self) -> tuple[str, ...]:
        """All cell types of any version, sorted."""
        return tuple(sorted({name for version in self.versions for name in version.cell_types}))

    def matches_frame(self) -> pd.DataFrame:
        """Return a row per head and pair of consecutive versions: its partner, how alike, how sure; new heads, too."""
        return comparison_frames.matches_frame(self)

    def differences_frame(self) -> pd.DataFrame:
        """Return a row per matched pair (head ``full``: the whole model) x type: what changed, and how sure that is."""
        return comparison_frames.differences_frame(self)

    def gene_differences_frame(self) -> pd.DataFrame:
        """Return a row per matched pair x type x gene; no rows in a comparison that was read back from JSON."""
        return comparison_frames.gene_differences_frame(self)

    def versions_frame(self) -> pd.DataFrame:
        """Return a row per version x head x type: explained variance, significance, lineage."""
        return comparison_frames.versions_frame(self)

    def to_json(self) -> str:
        """Return the comparison as JSON text, without what is per gene; undefined numbers are ``null``."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        plain["versions"] = [one.to_record() for one in self.versions]
        plain["failed"] = [vars(one) for one in self.failed]
        plain["matches"] = [one.to_record() for one in self.matches]
        plain["differences"] = [one.to_record() for one in self.differences]
        plain["overall"] = [_finite(vars(one)) for one in self.overall]
        plain["lineages"] = [_finite(vars(one)) for one in self.lineages]
        plain["similarity"] = [
            {"before": before, "after": after, "values": _list_of(values)}
            for (before, after), values in self.similarity.items()
        ]
        plain["floor"] = None if self.floor is None else _list_of(self.floor)
        plain["reseeded"] = _list_of(self.reseeded)
        plain["notes"] = list(self.notes)
        return json.dumps(plain, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> HeadComparison:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        DataError
            If the text is no comparison, damaged, or of another schema.
        """
        try:
            record = dict(json.loads(text))
            version = record["schema_version"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                value=f"not a comparison ({error})",
                rule=f"it must be the {COMPARISON_FILE} of a run",
                fix="download it again",
            ) from error
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise DataError(
                value=f"comparison of schema version {version!r}",
                rule=f"this version of amici_eval reads schema versions 1 to {SCHEMA_VERSION}",
                fix="install the version of amici_eval that wrote it",
            )
        try:
            record["versions"] = tuple(ComparedVersion.from_record(one, {}) for one in record["versions"])
            record["failed"] = tuple(FailedVersion(**one) for one in record["failed"])
            record["matches"] = tuple(HeadMatches.from_record(one, {}) for one in record["matches"])
            record["differences"] = tuple(HeadDifferences.from_record(one, {}) for one in record["differences"])
            record["overall"] = tuple(Overall(**_with_nan(one)) for one in record["overall"])
            record["lineages"] = tuple(
                Lineage(heads=tuple(one["heads"]), stability=_nan_if_none(one["stability"]))
                for one in record["lineages"]
            )
            record["similarity"] = {
                (one["before"], one["after"]): np.array(one["values"], dtype=np.float64) for one in record["similarity"]
            }
            for name in ("floor", "reseeded"):
                record[name] = None if record[name] is None else np.array(record[name], dtype=np.float64)
            record["notes"] = tuple(record["notes"])
            return cls(**record)
        except (KeyError, TypeError, ValueError, OverflowError, IndexError, AttributeError) as error:
            raise DataError(
                value=f"damaged comparison ({type(error).__name__}: {error})",
                rule="all fields of its schema version must be there, with matching sizes",
                fix="download it again or compare again",
            ) from error

    def save(self, directory: str | Path) -> Path:
        """Write the comparison into a folder (made if missing) and return the file."""
        path = Path(directory) / COMPARISON_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, directory: str | Path) -> HeadComparison:
        """Read what :meth:`save` wrote.

        Raises
        ------
        DataError
            If the folder holds no comparison or a damaged one.
        """
        path = Path(directory) / COMPARISON_FILE
        if not path.is_file():
            raise DataError(
                value=f"{directory} holds no {COMPARISON_FILE}",
                rule="load() takes a folder that save() or a run wrote",
                fix="give the folder itself",
            )
        return cls.from_json(path.read_bytes())


def _list_of(values: np.ndarray) -> list[Any]:
    plain: list[Any] = np.where(np.isfinite(values), values, None).tolist()  # type: ignore[call-overload]
    return plain


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in record.items()
    }


def _nan_if_none(value: float | None) -> float:
    return float("nan") if value is None else value


def _with_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float("nan") if value is None else value for name, value in record.items()}
