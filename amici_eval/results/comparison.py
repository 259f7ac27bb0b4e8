"""The results of a comparison of heads: versions side by side, matches, changes and lineages."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from amici_eval.results import comparison_frames
from amici_eval.results.codec import MOST_HEADS, Record, load_result, plain, read_result, save_result

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pandas as pd
    from jaxtyping import Float64, Int64

COMPARISON_FILE = "comparison.json"
SCHEMA_VERSION = 2
WHOLE_MODEL = -1
"""Stands for all heads together where a head is named by its number."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ComparedVersion(Record):
    """One column of a comparison: a model version on a data set.

    ``setup``: hash of the training set-up, None if unknown; versions that share it differ in seed and data order only.
    ``expl_var``: of each head kept alone; ``full``: of the whole model; ``p_value_adj``: of the null ``decided_by``.
    """

    sized_by: ClassVar[Mapping[str, str | int]] = {"heads": "n_heads", "types": "cell_types"}

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
    def n_significant(self) -> int:
        """Number of head x type pairs that are significant."""
        return int(np.count_nonzero(self.p_value_adj <= self.alpha))


@dataclass(frozen=True, kw_only=True)
class FailedVersion(Record):
    """A version that could not be evaluated."""

    label: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadMatches(Record):
    """Which head of one version corresponds to which head of another.

    ``similarity``: correlation of contributions over sketched cells and shared genes, NaN for dead heads; ``partner``:
    head of ``after``, -1 if gone. ``p_value``: similarity, matching included, where cells of a type are exchangeable;
    ``p_value_spatial``: signs of whole tiles flipped instead, NaN (``reason``) with too few tiles. ``cka``: linear;
    ``divergence``: Jensen-Shannon, in bits, NaN without kept attention; ``profile_cosine``: of explained variance by
    gene; ``reseeded``: both have one training set-up.
    """

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

    @classmethod
    def sizes_in(cls, values: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes of dimensions that fields, or their plain values, decide."""
        n_after = len(values["similarity"][0]) if len(values["similarity"]) else 0
        return {"before": len(values["partner"]), "after": n_after, "types": len(values["cell_types"])}

    @property
    def matched(self) -> Float64[np.ndarray, " before"]:
        """Similarity of each head of ``before`` to its partner; NaN if it is gone."""
        found = np.full(len(self.partner), np.nan)
        has = self.partner >= 0
        found[has] = self.similarity[np.flatnonzero(has), self.partner[has]]
        return found

    @property
    def new(self) -> tuple[int, ...]:
        """Heads of ``after`` without a partner in ``before``."""
        return tuple(sorted(set(range(self.similarity.shape[1])) - set(self.partner.tolist())))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadDifferences(Record):
    """Changes from one version to the next of matched heads and of the whole model, on the same cells.

    The last of the matched pairs is the whole model (:data:`WHOLE_MODEL` in both). ``difference`` is ``after`` minus
    ``before``, p is two-sided by sign flips of tiles; ``p_value_equivalence`` is small if the difference lies inside
    the margin, ``p_value_not_worse`` if ``after`` is not worse by the margin. ``verdict`` (better, worse, same,
    undecided) is row-major over M x C. Values per gene are kept in a table of their own, not in JSON.
    """

    sized_by: ClassVar[Mapping[str, str | int]] = {"matched": "head_before", "types": "cell_types"}
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

    def verdict_of(self, index: int, cell_type: int) -> str:
        """Return the verdict on one matched pair in one cell type."""
        return self.verdict[index * len(self.cell_types) + cell_type]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SenderDifferences(Record):
    """Changes in what matched heads take from each type of sender.

    ``lost_*`` and ``distance_*`` are ``effect`` and ``distance`` of :class:`Senders`. ``difference`` is the loss in
    ``after`` minus that in ``before``; p is two-sided by sign flips of tiles, ``p_value_equivalence`` small if the
    difference lies inside the margin. ``verdict`` (more: the head takes more than before; less, same, undecided) is
    row-major over M x C x S; an empty sender in ``reasons`` means all.
    """

    sized_by: ClassVar[Mapping[str, str | int]] = {
        "matched": "head_before",
        "types": "cell_types",
        "senders": "senders",
    }

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

    def reason(self, cell_type: str, sender: str) -> str:
        """Return why something has no value for a pair of types; empty where everything has."""
        return "; ".join(why for name, of, why in self.reasons if name == cell_type and of in ("", sender))


@dataclass(frozen=True, kw_only=True)
class Overall(Record):
    """Change of the whole model from one version to the next, over all cell types together.

    Fields as in :class:`HeadDifferences`; NaN where undefined.
    """

    may_be_undefined = ("difference", "low", "high", "p_value", "p_value_equivalence", "p_value_not_worse")

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
class Lineage(Record):
    """One head through the versions.

    ``heads``: its number in each version, None where it is missing. ``stability``: mean similarity over all pairs of
    versions, 0 for a pair where it is missing; NaN with one version.
    """

    may_be_undefined = ("stability",)

    heads: tuple[int | None, ...]
    stability: float

    def __post_init__(self) -> None:
        if not all(head is None or 0 <= head < MOST_HEADS for head in self.heads):
            msg = f"Lineage.heads holds {self.heads}"
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadComparison(Record):
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
    senders
        What changed in who talks to whom, of consecutive versions for which senders were computed.
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
    senders: tuple[SenderDifferences, ...] = ()
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
        for one in (*self.versions, *self.matches, *self.differences, *self.senders):
            one.check({})
        of_pairs: tuple[Any, ...] = (*self.matches, *self.differences, *self.overall, *self.senders)
        pairs = [(one.before, one.after) for one in of_pairs]
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

    def senders_frame(self) -> pd.DataFrame:
        """Return a row per matched head x receiver type x sender type: what changed in who talks to whom.

        No rows unless senders were computed (``ablation.senders=true``).
        """
        return comparison_frames.sender_differences_frame(self)

    def versions_frame(self) -> pd.DataFrame:
        """Return a row per version x head x type: explained variance, significance, lineage."""
        return comparison_frames.versions_frame(self)

    def to_json(self) -> str:
        """Return the comparison as JSON text, without what is per gene; undefined numbers are ``null``."""
        return json.dumps(self.to_record(), allow_nan=False, ensure_ascii=False)

    def to_record(self) -> dict[str, Any]:
        """Return plain values for JSON; pairs of versions cannot be the keys of an object."""
        similarity = ({"before": pair[0], "after": pair[1], "values": one} for pair, one in self.similarity.items())
        return {**super().to_record(), "similarity": [plain(one) for one in similarity]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], sizes: Mapping[str, int]) -> HeadComparison:
        """Read what :meth:`to_record` gave, in this version or an earlier one."""
        similarity = {
            (one["before"], one["after"]): np.array(one["values"], dtype=np.float64) for one in record["similarity"]
        }
        # schema version 1 has no senders
        record = {"senders": [], **record}
        values = {**{entry.name: record[entry.name] for entry in fields(cls)}, "similarity": {}}
        return replace(super().from_record(values, sizes), similarity=similarity, schema_version=SCHEMA_VERSION)

    @classmethod
    def from_json(cls, text: str | bytes) -> HeadComparison:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        DataError
            If the text is no comparison, damaged, or of another schema.
        """
        return read_result(
            cls, text, what="a comparison", file_name=COMPARISON_FILE, newest=SCHEMA_VERSION, redo="compare again"
        )

    def save(self, directory: str | Path) -> Path:
        """Write the comparison into a folder (made if missing) and return the file."""
        return save_result(directory, COMPARISON_FILE, self.to_json())

    @classmethod
    def load(cls, directory: str | Path) -> HeadComparison:
        """Read what :meth:`save` wrote.

        Raises
        ------
        DataError
            If the folder holds no comparison or a damaged one.
        """
        return load_result(directory, COMPARISON_FILE, cls.from_json)
