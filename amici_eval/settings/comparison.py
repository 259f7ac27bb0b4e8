"""How heads of versions are compared, and the rules that a model version is judged by."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import InvalidSpecError
from amici_eval.settings.checks import check_alias
from amici_eval.settings.evaluation import settings_that_matter

if TYPE_CHECKING:
    from amici_eval.settings.evaluation import EvaluationSpec

_CELLS = ("auto", "held_out", "all")


@dataclass(frozen=True, kw_only=True)
class ComparisonSpec:
    """How heads of two versions are matched, and when a difference counts.

    Parameters
    ----------
    cells
        ``held_out``: the cells that no compared version was fitted on; ``all``: all cells; ``auto``: the first where
        there are enough of them, else the second, said so.
    unmatched
        Heads that are not more alike than this are not the same head (similarity, 0 to 1).
    margin
        Differences of explained variance below this are too small to matter.
    n_permutations
        Of cells, and flips of tiles, behind the p of a match.
    n_flips
        Flips of tiles behind the p of a difference.
    n_bootstrap
        Resamples of tiles behind the intervals of differences.
    confidence
        Coverage of these intervals.
    alpha
        Level of significance.
    adjustment
        ``bh``, ``by`` or ``holm``: over all matched heads x types, and over all matched heads x types x genes.
    genes
        Also test differences gene by gene.
    floor
        Also match two untrained models of the architecture, to see how alike these are.
    seed
        What permutations, flips and resamples depend on.

    Raises
    ------
    InvalidSpecError
        If a value is not allowed.
    """

    cells: str = "auto"
    unmatched: float = 0.2
    margin: float = 0.01
    n_permutations: int = 999
    n_flips: int = 9999
    n_bootstrap: int = 1000
    confidence: float = 0.95
    alpha: float = 0.05
    adjustment: str = "bh"
    genes: bool = True
    floor: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("cells", _CELLS), ("adjustment", ("bh", "by", "holm"))):
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidSpecError(
                    value=f"compare.{name}={value!r}",
                    rule=f"it must be one of {', '.join(allowed)}",
                    fix=f"choose one of these, or leave compare.{name} out",
                )
        for name, least, below in (
            ("unmatched", 0.0, 1.0),
            ("margin", 0.0, 1.0),
            ("confidence", 0.0, 1.0),
            ("alpha", 0.0, 1.0),
        ):
            value = getattr(self, name)
            inside = least <= value < below if name == "unmatched" else least < value < below
            if isinstance(value, bool) or not inside:
                raise InvalidSpecError(
                    value=f"compare.{name}={value!r}",
                    rule=f"it must lie between {least:g} and {below:g}",
                    fix=f"leave compare.{name} out for the default, {getattr(type(self), name)}",
                )
        for name, least_count in (("n_permutations", 19), ("n_flips", 19), ("n_bootstrap", 50), ("seed", 0)):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < least_count:
                raise InvalidSpecError(
                    value=f"compare.{name}={count!r}",
                    rule=f"it must be a whole number of at least {least_count}",
                    fix=f"leave compare.{name} out for the default, {getattr(type(self), name)}",
                )


_LIMITS = frozenset({"at_least", "at_most"})
_ELEMENTS = frozenset({"types", "min_cells", "need"})
KINDS: Mapping[str, frozenset[str]] = {
    "metric": _LIMITS | {"metric"},
    "cell": _LIMITS | {"table", "column", "where", "need"},
    "significant_heads": _LIMITS | {"types"},
    "explained_variance": _LIMITS | _ELEMENTS,
    "gain": _LIMITS | _ELEMENTS,
    "required_types": frozenset({"types"}),
    "required_genes": frozenset({"genes"}),
    "non_inferiority": _ELEMENTS | {"of", "margin"},
    "superiority": _ELEMENTS | {"of", "margin"},
    "stability": frozenset({"at_least"}),
}
"""What each kind of rule takes besides its name."""
_TEXTS = frozenset({"kind", "metric", "table", "column", "of"})
AGAINST_BASELINE = frozenset({"non_inferiority", "superiority", "stability"})
"""Kinds that need a baseline."""
TABLES = ("heads", "explained_variance", "baselines", "held_out", "scales", "ablations", "head_interactions", "senders")
_OF = ("overall", "types", "heads")
_NEEDED = {
    "metric": ("metric",),
    "cell": ("table", "column"),
    "required_types": ("types",),
    "required_genes": ("genes",),
    "stability": ("at_least",),
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule of a gate.

    Parameters
    ----------
    name
        How the verdict calls it.
    kind
        One of :data:`KINDS`.
    at_least, at_most
        Bounds of the value; where the value has a confidence interval, the whole interval must lie within them.
    metric
        Name of a metric of the run.
    table, column, where
        A table of the run without its ending, a column of it, and the rows that count, as column -> value in text.
    types, genes
        Cell types that are judged; ``None``: all with at least ``min_cells`` evaluated cells. Genes that are required.
    min_cells
        Fewest evaluated cells of a type that is judged where ``types`` does not name it.
    need
        How many of the judged types, heads or rows must pass: ``all``, ``any``, or a number.
    of
        What is compared with the baseline: ``overall`` (all cells and heads together), ``types`` (all heads together,
        by type), ``heads`` (matched heads, by type).
    margin
        Of explained variance: not worse means by less than this, superior means by more than this.

    Raises
    ------
    InvalidSpecError
        If a value is not allowed, or the kind does not take it.
    """

    name: str
    kind: str
    at_least: float | None = None
    at_most: float | None = None
    metric: str | None = None
    table: str | None = None
    column: str | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    types: tuple[str, ...] | None = None
    genes: tuple[str, ...] | None = None
    min_cells: int = 50
    need: str = "all"
    of: str = "overall"
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            self._refuse("kind", f"it must be one of {', '.join(KINDS)}")
        takes = KINDS[self.kind]
        for entry in fields(self):
            if entry.name in ("name", "kind") or entry.name in takes:
                continue
            default = {} if entry.name == "where" else entry.default
            if getattr(self, entry.name) != default:
                self._refuse(entry.name, f"a rule of kind {self.kind} takes {', '.join(sorted(takes))}")
        for name in ("at_least", "at_most", "margin"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and math.isfinite(value)):
                self._refuse(name, "it must be a finite number")
        if self.kind == "superiority" and self.margin is not None and self.margin < 0.0:
            self._refuse("margin", "better by more than a negative number may be worse")
        for name in _NEEDED.get(self.kind, ()):
            if getattr(self, name) in (None, (), ""):
                self._refuse(name, f"a rule of kind {self.kind} needs it")
        if takes >= _LIMITS and self.at_least is None and self.at_most is None:
            self._refuse("at_least", "a rule needs at_least, at_most or both")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            self._refuse("at_least", f"it must not be above at_most={self.at_most:g}")
        if self.table is not None and self.table not in TABLES:
            self._refuse("table", f"it must be one of {', '.join(TABLES)}")
        if self.of not in _OF:
            self._refuse("of", f"it must be one of {', '.join(_OF)}")
        if self.need not in ("all", "any") and not (str(self.need).isdecimal() and int(self.need) > 0):
            self._refuse("need", "it must be all, any, or a whole number of at least 1")
        if not isinstance(self.min_cells, int) or isinstance(self.min_cells, bool) or self.min_cells < 1:
            self._refuse("min_cells", "it must be a whole number of at least 1")

    def _refuse(self, name: str, rule: str) -> None:
        raise InvalidSpecError(
            value=f"gate.rules.{self.name}.{name}={getattr(self, name)!r}",
            rule=rule,
            fix="see docs/automation.md for the kinds of rules",
        )

    @property
    def against_baseline(self) -> bool:
        """Whether it needs a baseline."""
        return self.kind in AGAINST_BASELINE


_ENTRIES = tuple(entry.name for entry in fields(Rule) if entry.name != "name")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """What a version must fulfil, and what happens then.

    Parameters
    ----------
    rules
        In order; at least one. Each has a kind and what that takes, as ``gate.rules.NAME.margin=0.02``.
    bootstrap
        While there is no baseline yet: ``pass`` counts rules against it as passed, ``fail`` as failed.
    allow_in_sample
        Judge on cells that one of the versions was fitted on; else such a verdict is undecided.
    allow_missing_genes
        Compare with a baseline that has genes which the version lacks, on the others; else such a verdict is undecided.
    promote
        Alias that moves to the version if it passes; ``None``: none.
    left_out
        Names of rules that were taken away.

    Raises
    ------
    InvalidSpecError
        If a value is not allowed.
    """

    rules: tuple[Rule, ...]
    bootstrap: str = "pass"
    allow_in_sample: bool = False
    allow_missing_genes: bool = False
    promote: str | None = None
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bootstrap not in ("pass", "fail"):
            raise InvalidSpecError(
                value=f"gate.bootstrap={self.bootstrap!r}", rule="it must be pass or fail", fix="choose one of these"
            )
        if self.promote is not None:
            check_alias("gate.promote", self.promote)
        if not self.rules:
            raise InvalidSpecError(
                value="gate.rules is empty",
                rule="a version that nothing is asked of cannot pass",
                fix="choose gate=default or gate=strict, or write rules",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; equal specs give equal values."""
        return {
            "bootstrap": self.bootstrap,
            "allow_in_sample": self.allow_in_sample,
            "allow_missing_genes": self.allow_missing_genes,
            "promote": self.promote,
            "rules": [asdict(rule) for rule in self.rules],
        }


def gate_spec_from(values: Mapping[str, Any]) -> GateSpec:
    """Return the settings that plain values hold, rules as name -> mapping; a rule that is ``None`` is left out."""
    _check_kinds(values)
    rules, left_out = [], []
    for name, given in values["rules"].items():
        if given is None:
            left_out.append(str(name))
            continue
        if not isinstance(given, Mapping):
            raise InvalidSpecError(
                value=f"gate.rules.{name}={given!r}",
                rule="a rule is a mapping with its kind and what that takes, or null to leave it out",
                fix="see docs/automation.md for the kinds of rules",
            )
        entries = {str(key): value for key, value in given.items() if value is not None}
        for key in entries:
            if key not in _ENTRIES:
                near = get_close_matches(key, _ENTRIES, n=2) or _ENTRIES
                raise InvalidSpecError(
                    value=f"setting 'gate.rules.{name}.{key}'",
                    rule=f"a rule has {', '.join(_ENTRIES)}",
                    fix=f"write {' or '.join(f'gate.rules.{name}.{one}' for one in near)}",
                )
        if "kind" not in entries:
            raise InvalidSpecError(
                value=f"gate.rules.{name} has no kind",
                rule=f"it must be one of {', '.join(KINDS)}",
                fix="add kind, or correct the name of the rule that you meant to change",
            )
        for key in ("types", "genes"):
            if key in entries:
                names = [entries[key]] if isinstance(entries[key], str) else entries[key]
                if not isinstance(names, (list, tuple)):
                    raise InvalidSpecError(
                        value=f"gate.rules.{name}.{key}={names!r}",
                        rule="it must be a list of names",
                        fix="write [A, B]",
                    )
                entries[key] = tuple(str(one) for one in names)
        if "where" in entries and not isinstance(entries["where"], Mapping):
            raise InvalidSpecError(
                value=f"gate.rules.{name}.where={entries['where']!r}",
                rule="it must be a mapping of columns to values",
                fix="write {column: value}",
            )
        for key in _TEXTS & set(entries):
            if not isinstance(entries[key], (str, int, float)):
                raise InvalidSpecError(
                    value=f"gate.rules.{name}.{key}={entries[key]!r}", rule="it must be a name", fix="write a text"
                )
            entries[key] = str(entries[key])
        if "where" in entries:
            entries["where"] = {str(key): str(value) for key, value in dict(entries["where"]).items()}
        if "need" in entries:
            entries["need"] = str(entries["need"])
        rules.append(Rule(name=str(name), **entries))
    others = {name: value for name, value in values.items() if name != "rules"}
    return GateSpec(rules=tuple(rules), left_out=tuple(left_out), **others)


def _check_kinds(values: Any) -> None:
    """Refuse settings of a gate that are no settings, or of another kind."""
    if not isinstance(values, Mapping) or not isinstance(values.get("rules"), Mapping):
        raise InvalidSpecError(
            value=f"gate={values!a:.200}",
            rule="it must be a group of settings with rules by name",
            fix="see docs/automation.md",
        )
    known = {"rules", "bootstrap", "allow_in_sample", "allow_missing_genes", "promote"}
    for name, value in values.items():
        if name not in known:
            raise InvalidSpecError(
                value=f"setting 'gate.{name}'", rule=f"gate has {', '.join(sorted(known))}", fix="correct the name"
            )
        if name in ("allow_in_sample", "allow_missing_genes") and not isinstance(value, bool):
            raise InvalidSpecError(
                value=f"gate.{name}={value!r}", rule="it must be true or false", fix=f"set gate.{name}=false"
            )
        if name == "promote" and value is not None and not isinstance(value, str):
            raise InvalidSpecError(value=f"gate.promote={value!r}", rule="it must be an alias", fix="write a text")


def gate_key(
    *,
    baseline: str | None,
    data_uri: str | None,
    spec: EvaluationSpec,
    comparison: ComparisonSpec,
    gate: GateSpec,
) -> str:
    """Return a hash of what a verdict depends on besides the version: 12 hexadecimal digits."""
    where = data_uri if data_uri is None or "://" in data_uri else str(Path(data_uri).expanduser().absolute())
    settings = [baseline, where, settings_that_matter(spec), asdict(comparison), gate.to_dict()]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:12]
