"""A verdict on a model version: each rule with value, interval, threshold, outcome and reason."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import DataError
from amici_eval.common.files import parse_json, read_plain_file
from amici_eval.results.codec import Record, check_schema_version, save_result

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

VERDICT_FILE = "verdict.json"
SCHEMA_VERSION = 1
_MOST_VALUES = 10**7
_MOST_BYTES = 2**28
OUTCOMES = ("pass", "fail", "undecided")


@dataclass(frozen=True, kw_only=True)
class RuleResult(Record):
    """The outcome of one rule.

    ``outcome``: pass, fail or undecided; ``value``, ``low``, ``high``: what was judged, None where missing; of several
    types, heads or rows, the one that decided. ``details``: each of several, as (name, value, low, high, outcome).
    """

    rule: str
    kind: str
    outcome: str
    value: float | None
    low: float | None
    high: float | None
    threshold: str
    reason: str
    details: tuple[tuple[str, float | None, float | None, float | None, str], ...] = ()

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            msg = f"outcome {self.outcome!r} must be one of {', '.join(OUTCOMES)}"
            raise ValueError(msg)
        for name in ("value", "low", "high"):
            object.__setattr__(self, name, _finite(getattr(self, name)))
        details = tuple(
            (str(one), _finite(value), _finite(low), _finite(high), str(outcome))
            for one, value, low, high, outcome in self.details
        )
        object.__setattr__(self, "details", details)


@dataclass(frozen=True, kw_only=True)
class Verdict(Record):
    """Whether a version may take the place of its baseline, and why.

    Parameters
    ----------
    outcome
        ``pass`` if all rules pass, ``fail`` if one fails, else ``undecided``.
    results
        Of the rules, in order.
    model, baseline
        The version and what it was judged against, as plain values (``uri``, ``name``, ``version``, ``model_id``,
        ``evaluation_run_id``); no baseline: ``None``.
    cells
        On which cells, in words.
    in_sample
        Whether one of the versions was fitted on some of them; ``None``: not known.
    key
        Hash of the configuration; a version has one verdict for each.
    notes
        Remarks.
    schema_version
        Of this record.
    """

    outcome: str
    results: tuple[RuleResult, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    baseline: Mapping[str, Any] | None = None
    cells: str = ""
    in_sample: bool | None = None
    key: str = ""
    notes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        expected = overall_outcome(result.outcome for result in self.results)
        if self.outcome != expected:
            msg = f"outcome {self.outcome!r} does not follow from the rules, which say {expected}"
            raise ValueError(msg)

    @property
    def passed(self) -> bool:
        """Whether all rules pass."""
        return self.outcome == "pass"

    def to_json(self) -> str:
        """Return the verdict as JSON text."""
        # escape to ASCII: names may hold characters that cannot be encoded, such as a lone surrogate
        return json.dumps(self.to_record(), allow_nan=False, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Verdict:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        DataError
            If the text is no verdict, damaged, of another schema, or says another outcome than its rules.
        """
        try:
            record = dict(parse_json(text, max_values=_MOST_VALUES))
            check_schema_version(record["schema_version"], what="verdict", newest=SCHEMA_VERSION)
            return cls.from_record(record, {})
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                value=f"damaged verdict ({type(error).__name__}: {error})",
                rule=f"it must be the {VERDICT_FILE} of a run",
                fix="download it again or judge again",
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Verdict:
        """Read what :meth:`save` wrote, given the file or its folder.

        Raises
        ------
        DataError
            If there is no verdict or a damaged one.
        """
        where = Path(path)
        file = where / VERDICT_FILE if where.is_dir() else where
        content = _readable(file)
        try:
            return cls.from_json(content)
        except DataError as error:
            raise DataError(value=f"{file}: {error.value}", rule=error.rule, fix=error.fix) from error

    def save(self, directory: str | Path) -> Path:
        """Write the verdict into a folder (made if missing) and return the file."""
        return save_result(directory, VERDICT_FILE, self.to_json())


def _readable(path: Path) -> bytes:
    try:
        return read_plain_file(path, limit=_MOST_BYTES, links=True)
    except (OSError, ValueError) as error:
        raise DataError(
            value=f"{path} cannot be read ({getattr(error, 'strerror', None) or error})",
            rule=f"it must be the {VERDICT_FILE} of a run, or the folder that holds it",
            fix="give that file or folder",
        ) from error


def overall_outcome(outcomes: Iterable[str]) -> str:
    """Return ``fail`` if a rule fails, else ``undecided`` if one is undecided or there is none, else ``pass``."""
    there = set(outcomes)
    if "fail" in there:
        return "fail"
    return "pass" if there == {"pass"} else "undecided"


def _finite(value: Any) -> float | None:
    """Return a finite number for JSON, ``None`` for anything else."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
