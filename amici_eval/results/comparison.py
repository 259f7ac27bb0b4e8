"""The results of a comparison of heads: versions side by side, matches and changes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.errors import DataError
from amici_eval.common.untrusted import parse_json
from amici_eval.results import comparison_frames
from amici_eval.results.matches import (
    ComparedVersion,
    FailedVersion,
    HeadDifferences,
    HeadMatches,
    Lineage,
    Overall,
    check_settings,
)
from amici_eval.results.named_arrays import read_named
from amici_eval.results.senders import SenderDifferences, sender_differences_frame

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from jaxtyping import Float64

COMPARISON_FILE = "comparison.json"
SCHEMA_VERSION = 2
_MOST_VALUES = 10**8


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
            one.check(one.own_sizes)
        pairs = [(one.before, one.after) for one in self.matches]
        pairs += [(one.before, one.after) for one in self.differences]
        pairs += [(one.before, one.after) for one in self.overall]
        pairs += [(one.before, one.after) for one in self.senders]
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
        return sender_differences_frame(self.labels, self.senders)

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
        plain["senders"] = [one.to_record() for one in self.senders]
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
            record = dict(parse_json(text, max_values=_MOST_VALUES))
            version = record["schema_version"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                value=f"not a comparison ({error})",
                rule=f"it must be the {COMPARISON_FILE} of a run",
                fix="download it again",
            ) from error
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise DataError(
                value=f"comparison of schema version {version!a:.80}",
                rule=f"this version of amici_eval reads schema versions 1 to {SCHEMA_VERSION}",
                fix="install the version of amici_eval that wrote it",
            )
        try:
            check_settings(record)
            record["versions"] = tuple(ComparedVersion.from_record(one, {}) for one in record["versions"])
            record["failed"] = tuple(FailedVersion(**one) for one in record["failed"])
            record["matches"] = tuple(HeadMatches.from_record(one, {}) for one in record["matches"])
            record["differences"] = tuple(HeadDifferences.from_record(one, {}) for one in record["differences"])
            # new in schema version 2
            record["senders"] = tuple(SenderDifferences.from_record(one, {}) for one in record.get("senders", ()))
            record["schema_version"] = SCHEMA_VERSION
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
        except (KeyError, TypeError, ValueError, OverflowError, LookupError, AttributeError, MemoryError) as error:
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
        return read_named(path, cls.from_json)


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
