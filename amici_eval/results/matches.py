"""The parts of a comparison of heads: versions, matches, differences, lineages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np

from amici_eval.results.named_arrays import NamedArrays

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float64, Int64

WHOLE_MODEL = -1
"""Stands for all heads together where a head is named by its number."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ComparedVersion(NamedArrays):
    """One column of a comparison: a model version on a data set.

    ``setup``: hash of the training set-up, None if unknown; versions that share it differ in seed and data order only.
    ``expl_var``: of each head kept alone; ``full``: of the whole model; ``p_value_adj``: of the null ``decided_by``.
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
    """A version that could not be evaluated."""

    label: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadMatches(NamedArrays):
    """Which head of one version corresponds to which head of another.

    ``similarity``: correlation of contributions over sketched cells and shared genes, NaN for dead heads; ``partner``:
    head of ``after``, -1 if gone. ``p_value``: similarity, matching included, where cells of a type are exchangeable;
    ``p_value_spatial``: signs of whole tiles flipped instead, NaN (``reason``) with too few tiles. ``cka``: linear;
    ``divergence``: Jensen-Shannon, in bits, NaN without kept attention; ``profile_cosine``: of explained variance by
    gene; ``reseeded``: both have one training set-up.
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
        """Heads of ``after`` without a partner in ``before``."""
        return tuple(sorted(set(range(self.similarity.shape[1])) - set(self.partner.tolist())))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadDifferences(NamedArrays):
    """Changes from one version to the next of matched heads and of the whole model, on the same cells.

    The last of the matched pairs is the whole model (:data:`WHOLE_MODEL` in both). ``difference`` is ``after`` minus
    ``before``, p is two-sided by sign flips of tiles; ``p_value_equivalence`` is small if the difference lies inside
    the margin, ``p_value_not_worse`` if ``after`` is not worse by the margin. ``verdict`` (better, worse, same,
    undecided) is row-major over M x C. Values per gene are kept in a table of their own, not in JSON.
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
    """Change of the whole model from one version to the next, over all cell types together.

    Fields as in :class:`HeadDifferences`; NaN where undefined.
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

    ``heads``: its number in each version, None where it is missing. ``stability``: mean similarity over all pairs of
    versions, 0 for a pair where it is missing; NaN with one version.
    """

    heads: tuple[int | None, ...]
    stability: float


def check_settings(record: Mapping[str, Any]) -> None:
    """Refuse plain values of a comparison that are not of the kind that is written."""
    numbers = [*((name, record.get(name, 0)) for name in ("unmatched", "margin", "alpha", "confidence", "seed"))]
    for number, one in enumerate(record["lineages"]):
        if not all(head is None or (type(head) is int and 0 <= head < 2**31) for head in one["heads"]):
            _refuse(f"lineages[{number}].heads")
        if one["stability"] is not None:
            numbers.append((f"lineages[{number}].stability", one["stability"]))
    for number, one in enumerate(record["overall"]):
        for name in ("before", "after", "n_tiles"):
            if type(one[name]) is not int:
                _refuse(f"overall[{number}].{name}")
        texts = {"verdict": one["verdict"]}
        numbers += [(f"overall[{number}].{name}", value) for name, value in one.items() if name not in texts]
        if not isinstance(one["verdict"], str):
            _refuse(f"overall[{number}].verdict")
    for name, value in numbers:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            _refuse(name)
    if not isinstance(record.get("cells", ""), str) or not isinstance(record["kind"], str):
        _refuse("cells or kind")
    if not isinstance(record.get("in_sample"), (bool, type(None))):
        _refuse("in_sample")
    texts_in = [*record["notes"], *(text for one in record["failed"] for text in one.values())]
    if not isinstance(record["notes"], list) or not all(isinstance(text, str) for text in texts_in):
        _refuse("notes or failed")


def _refuse(name: str) -> NoReturn:
    msg = f"{name} holds something else than it may"
    raise ValueError(msg)
