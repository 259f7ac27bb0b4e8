"""What a version is judged against, and what it may take the place of."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from amici_eval.common.errors import InvalidSpecError, ModelNotFoundError
from amici_eval.tracking.jobs.promotion import promoted_over
from amici_eval.tracking.models.registry import resolve_model
from amici_eval.tracking.models.registry_tags import RegistryTags

if TYPE_CHECKING:
    from amici_eval.tracking.models.registry import ResolvedModel

__all__ = ["GateBaseline", "baseline_of"]


@dataclass(frozen=True, kw_only=True)
class GateBaseline:
    """What a version is judged against.

    Parameters
    ----------
    model
        The baseline, if there is one.
    why_none
        Why there is none although the alias is set; ``None`` without a model: there is no baseline yet.
    expected
        Where the alias that moves on pass points to now.
    """

    model: ResolvedModel | None = None
    why_none: str | None = None
    expected: str | None = None


def baseline_of(candidate: ResolvedModel, baseline: str | None, promote: str | None) -> GateBaseline:
    """Return what a version is judged against.

    Notes
    -----
    A version that has the alias already is judged against the one that it replaced, by the record of promotions.
    """
    aliases = _aliases(candidate)
    now = None if promote is None else aliases.get(promote)
    near_promote = [] if promote is None or promote in aliases else get_close_matches(promote, list(aliases), n=1)
    if near_promote:
        raise InvalidSpecError(
            value=f"gate.promote={promote}",
            rule=f"{candidate.name} has no such alias, but {near_promote[0]}",
            fix=f"write gate.promote={near_promote[0]}, or set {promote} by hand if it shall be a new one",
        )
    if baseline is None:
        _may_replace(candidate, None, baseline, promote, now)
        return GateBaseline(expected=now)
    named = baseline.startswith("@") or baseline.isdecimal()
    if named and candidate.name is None:
        raise InvalidSpecError(
            value=f"baseline={baseline} with model_uri={candidate.asked}",
            rule="an alias or a number names a version of the same registered model",
            fix="give models:/NAME/VERSION as model_uri, or a whole URI as baseline",
        )
    if baseline.startswith("@") and baseline[1:] not in aliases:
        near = get_close_matches(baseline[1:], list(aliases), n=1)
        if near:
            raise ModelNotFoundError(
                value=f"baseline={baseline}: {candidate.name} has no alias {baseline[1:]}",
                rule=f"its aliases are {', '.join(sorted(aliases))}",
                fix=f"write baseline=@{near[0]}",
            )
        _may_replace(candidate, None, baseline, promote, now)
        return GateBaseline(expected=now)
    if named:
        # the alias is read once: what was judged against is what may be replaced
        version = aliases[baseline[1:]] if baseline.startswith("@") else baseline
        model = resolve_model(f"models:/{candidate.name}/{version}")
    else:
        model = resolve_model(baseline)
    _may_replace(candidate, model, baseline, promote, now)
    if (model.name, model.version) != (candidate.name, candidate.version) or model.name is None:
        return GateBaseline(model=model, expected=now)
    return _of_itself(candidate, baseline, now)


def _of_itself(candidate: ResolvedModel, baseline: str, now: str | None) -> GateBaseline:
    """Return what a version is judged against that is the baseline itself."""
    unknown = "the version is the baseline itself, and what it replaced is not on record: there is nothing to compare"
    assert candidate.name is not None  # noqa: S101, RUF100 - for the type checker
    assert candidate.version is not None  # noqa: S101, RUF100 - for the type checker
    entry = promoted_over(candidate.name, baseline[1:], candidate.version) if baseline.startswith("@") else None
    if entry is None:
        return GateBaseline(why_none=unknown, expected=now)
    if entry["replaced"] is None:
        return GateBaseline(expected=now)
    try:
        return GateBaseline(model=resolve_model(f"models:/{candidate.name}/{entry['replaced']}"), expected=now)
    except ModelNotFoundError:
        gone = f"the version is the baseline itself, and version {entry['replaced']}, which it replaced, is gone"
        return GateBaseline(why_none=gone, expected=now)


def _may_replace(
    candidate: ResolvedModel, model: ResolvedModel | None, baseline: str | None, promote: str | None, now: str | None
) -> None:
    """Refuse to judge against one version and to take the place of another."""
    if promote is None or now is None or now == candidate.version:
        return
    if model is None or (model.name, model.version) != (candidate.name, now):
        raise InvalidSpecError(
            value=f"gate.promote={promote} with baseline={'null' if baseline is None else baseline}",
            rule=f"{promote} is version {now} of {candidate.name}; only what was judged against it takes its place",
            fix=f"set baseline=@{promote}, or leave gate.promote out",
        )


def _aliases(model: ResolvedModel) -> dict[str, str]:
    if model.name is None:
        return {}
    aliases = RegistryTags(name=model.name).ask("get_{}").aliases
    return {name: str(version) for name, version in aliases.items()}
