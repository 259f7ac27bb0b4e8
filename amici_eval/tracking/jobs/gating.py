"""The job behind ``gate``: evaluate a version and its baseline on the same cells, judge, save, tag, promote."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import AmiciEvalError, DataError, InvalidSpecError, ModelNotFoundError
from amici_eval.common.text import markdown, mask_secrets
from amici_eval.comparison.gate import judge
from amici_eval.report.verdict_files import verdict_section, verdict_sentence, write_verdict, write_verdict_page
from amici_eval.results.evaluation import HeadEvaluation
from amici_eval.settings.comparison import gate_key
from amici_eval.tracking.jobs.comparing import (
    Column,
    comparison_params,
    evaluations_run,
    label_of,
    write_comparison,
)
from amici_eval.tracking.jobs.promotion import ROLLED_BACK_TAG, Promotion, promote, promoted_over
from amici_eval.tracking.jobs.watching import VERDICT_TAG
from amici_eval.tracking.registry import connect_to, resolve_model, tag_version
from amici_eval.tracking.registry_tags import RegistryTags
from amici_eval.tracking.runs.delivery import evaluation_metrics, metric_intervals
from amici_eval.tracking.runs.local_results import ARTIFACTS
from amici_eval.tracking.runs.tracked import NOTE_TAG
from amici_eval.tracking.store import optional, patiently

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import pandas as pd

    from amici_eval.results.comparison import HeadComparison
    from amici_eval.results.verdict import Verdict
    from amici_eval.settings.comparison import ComparisonSpec, GateSpec
    from amici_eval.tracking.jobs import JobOptions
    from amici_eval.tracking.jobs.comparing import ColumnEvaluation, ComparedCells, GatheredEvaluations
    from amici_eval.tracking.registry import ResolvedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GateBaseline:
    """What a version is judged against.

    ``why_none``: why there is no model although the alias is set; if it and ``model`` are ``None``, there is no
    baseline yet. ``expected``: the version that the alias to promote points to now.
    """

    model: ResolvedModel | None = None
    why_none: str | None = None
    expected: str | None = None


def baseline_of(candidate: ResolvedModel, baseline: str | None, promote: str | None) -> GateBaseline:
    """Return what a version is judged against; one that has the alias already is judged against what it replaced."""
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
        # use the alias as read above: only the version that was judged against may be replaced
        version = aliases[baseline[1:]] if baseline.startswith("@") else baseline
        model = resolve_model(f"models:/{candidate.name}/{version}")
    else:
        model = resolve_model(baseline)
    _may_replace(candidate, model, baseline, promote, now)
    name, number = candidate.name, candidate.version
    if name is None or number is None or (model.name, model.version) != (name, number):
        return GateBaseline(model=model, expected=now)
    return _of_itself(name, number, baseline, now)


def _of_itself(name: str, version: str, baseline: str, now: str | None) -> GateBaseline:
    """Return the baseline of a version that is the baseline itself: the version that it replaced, if on record."""
    unknown = "the version is the baseline itself, and what it replaced is not on record: there is nothing to compare"
    entry = promoted_over(name, baseline[1:], version) if baseline.startswith("@") else None
    if entry is None:
        return GateBaseline(why_none=unknown, expected=now)
    if entry["replaced"] is None:
        return GateBaseline(expected=now)
    try:
        return GateBaseline(model=resolve_model(f"models:/{name}/{entry['replaced']}"), expected=now)
    except ModelNotFoundError:
        gone = f"the version is the baseline itself, and version {entry['replaced']}, which it replaced, is gone"
        return GateBaseline(why_none=gone, expected=now)


def _may_replace(
    candidate: ResolvedModel, model: ResolvedModel | None, baseline: str | None, promote: str | None, now: str | None
) -> None:
    """Refuse to promote over another version than the one that was judged against."""
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


@dataclass(frozen=True, kw_only=True)
class GateRun:
    """A verdict and the run that holds it.

    ``folder``: local copy of its artifacts, if it was kept; ``promotion``: ``None`` if no alias was to be moved;
    ``outdated``: the baseline was replaced meanwhile, so that the version must be judged again.
    """

    verdict: Verdict
    run_id: str
    tracking_uri: str
    folder: Path | None
    promotion: Promotion | None = None
    outdated: bool = False


def gate_job(
    *,
    model_uri: str,
    baseline: str | None,
    data_uri: str | None,
    comparison: ComparisonSpec,
    gate: GateSpec,
    options: JobOptions,
    dry_run: bool = False,
    newer_only: bool = False,
) -> GateRun:
    """Judge a version by rules and against its baseline, log the verdict, and promote the version if it passes."""
    tracking_uri = connect_to(options.tracking)
    candidate = resolve_model(model_uri)
    if gate.promote is not None and (candidate.name is None or candidate.version is None):
        raise InvalidSpecError(
            value=f"gate.promote={gate.promote} with model_uri={model_uri}",
            rule="an alias belongs to a registered version",
            fix="give models:/NAME/VERSION, or leave gate.promote out",
        )
    against = baseline_of(candidate, baseline, gate.promote)
    key = gate_key(baseline=baseline, data_uri=data_uri, spec=options.spec, comparison=comparison, gate=gate)
    models = [one for one in (against.model, candidate) if one is not None]
    columns = [Column(label=label_of(one), model=one) for one in models]
    with evaluations_run(
        columns,
        comparison,
        options,
        tracking_uri=tracking_uri,
        data_uri=data_uri,
        name=f"gate {columns[-1].label}",
        tags={"amici_eval.kind": "gate", "amici_eval.gate_key": key},
        need_moments=False,
    ) as run:
        compared = _compared(run.found, columns, comparison, run.cells)
        verdict = _verdict(
            run.found, columns, run.cells, gate, candidate=candidate, against=against, compared=compared, key=key
        )
        _write(verdict, compared.comparison, run.folder / ARTIFACTS, options)
        sentence = verdict_sentence(verdict)
        run.send(
            {VERDICT_TAG: verdict.outcome, f"{VERDICT_TAG}_reason": sentence, NOTE_TAG: markdown(sentence)},
            params={
                "cfg/gate.cells": run.cells.text,
                "cfg/gate.baseline": mask_secrets(str(baseline)),
                **comparison_params(comparison),
            },
            metrics={f"gate/{name}": float(_count(verdict, name)) for name in ("pass", "fail", "undecided")},
        )
        result = GateRun(
            verdict=verdict,
            run_id=run.run_id,
            tracking_uri=tracking_uri,
            folder=run.folder if options.tracking.keep_local else None,
        )
        if verdict.passed and gate.promote is not None:
            result = _promoted(
                result, candidate, gate.promote, against.expected, dry_run=dry_run, newer_only=newer_only
            )
        if not dry_run:
            tag_version(candidate, _verdict_tags(result), "its verdict")
    return result


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """The comparison of a version with its baseline, or why there is none although there is a baseline."""

    comparison: HeadComparison | None = None
    why_none: str | None = None


def _compared(
    found: GatheredEvaluations, columns: list[Column], spec: ComparisonSpec, cells: ComparedCells
) -> _Compared:
    if len(columns) < 2 or found.of(columns[-1]) is None:
        return _Compared()
    if found.of(columns[0]) is None:
        return _Compared(why_none=f"the baseline could not be evaluated: {found.why_failed(columns[0])}")
    try:
        return _Compared(comparison=found.compared(spec, cells=cells.text))
    except AmiciEvalError as error:
        logger.error("the version could not be compared with its baseline: %s", error)
        return _Compared(why_none=f"it could not be compared with the baseline: {error}")


def _verdict(
    found: GatheredEvaluations,
    columns: list[Column],
    cells: ComparedCells,
    gate: GateSpec,
    *,
    candidate: ResolvedModel,
    against: GateBaseline,
    compared: _Compared,
    key: str,
) -> Verdict:
    """Judge a version, the last of the columns, by its evaluation and its comparison with the baseline."""
    own, other = found.of(columns[-1]), found.of(columns[0])
    if own is None:
        raise DataError(
            value=f"{columns[-1].label} could not be evaluated ({found.why_failed(columns[-1])})",
            rule="a verdict needs an evaluation of the version",
            fix="mend that, and judge again",
        )
    evaluation, comparison = HeadEvaluation.load(own.folder), compared.comparison
    return judge(
        evaluation,
        gate,
        comparison=comparison,
        no_comparison=compared.why_none or against.why_none,
        metrics=evaluation_metrics(evaluation),
        intervals=metric_intervals(evaluation),
        missing_genes=_missing_genes(evaluation, other.folder) if comparison is not None and other is not None else (),
        tables=_tables(evaluation),
        model=_described(candidate, own),
        baseline=None if against.model is None else _described(against.model, other),
        cells=cells.text,
        in_sample=_in_sample(evaluation) if comparison is None else comparison.in_sample,
        key=key,
        notes=(*cells.notes, *(() if comparison is None else comparison.notes)),
    )


def _described(model: ResolvedModel, evaluated: ColumnEvaluation | None) -> dict[str, Any]:
    return {**model.describe(), "evaluation_run_id": None if evaluated is None else evaluated.run_id}


def _promoted(
    result: GateRun, candidate: ResolvedModel, alias: str, expected: str | None, *, dry_run: bool, newer_only: bool
) -> GateRun:
    """Promote a version that passed, and return the verdict with what became of that."""
    name, version = candidate.name, candidate.version
    if name is None or version is None:
        return result
    held_back = _held_back(name, version, expected, alias) if newer_only else None
    promotion = held_back or promote(
        name, version, alias=alias, expected=expected, run_id=result.run_id, dry_run=dry_run
    )
    # the alias should have moved to this version and did not: somebody else moved it
    wanted = held_back is None and promotion.replaced != version
    outdated = wanted and not promotion.moved and not (dry_run and promotion.replaced == expected)
    _tag_run(result.run_id, "amici_eval.promotion", promotion.reason)
    return replace(result, promotion=promotion, outdated=outdated)


def _missing_genes(evaluation: HeadEvaluation, baseline: Path) -> tuple[str, ...]:
    """Return genes of the baseline that the version lacks."""
    there = set(evaluation.genes)
    return tuple(name for name in HeadEvaluation.load(baseline).genes if name not in there)


def _held_back(name: str, version: str, now: str | None, alias: str) -> Promotion | None:
    """Return a refused promotion if a version is older than the alias's or was rolled back; ``None``: promote it."""
    if now == version:
        return None
    if now is not None and int(version) < int(now):
        reason = f"version {version} is older than version {now}, which is {alias}: not promoted"
    elif f"{ROLLED_BACK_TAG}.{alias}" in RegistryTags(name=name, version=version).read():
        reason = f"the promotion of version {version} to {alias} was taken back: not promoted again"
    else:
        return None
    return Promotion(name=name, alias=alias, version=version, replaced=now, moved=False, reason=reason)


def _in_sample(evaluation: HeadEvaluation) -> bool | None:
    """Return whether some evaluated cell was one the model was fitted on; ``None``: not known."""
    if False in evaluation.held_out:
        return True
    return None if None in evaluation.held_out or not evaluation.held_out else False


def _tables(evaluation: HeadEvaluation) -> Callable[[str], pd.DataFrame]:
    """Return a function that gives a table of the evaluation by its name and computes it only once."""
    frames: Mapping[str, Callable[[], pd.DataFrame]] = {
        "heads": evaluation.heads,
        "explained_variance": evaluation.to_frame,
        "baselines": evaluation.baselines,
        "held_out": evaluation.held_out_frame,
        "scales": evaluation.scales_frame,
        "ablations": evaluation.ablations_frame,
        "head_interactions": evaluation.interactions_frame,
        "senders": evaluation.senders_frame,
    }

    @cache
    def table(name: str) -> pd.DataFrame:
        return frames[name]()

    return table


def _write(verdict: Verdict, compared: HeadComparison | None, folder: Path, options: JobOptions) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # write the verdict before anything is drawn: drawing may fail
    write_verdict(verdict, folder)
    if compared is not None:
        section = verdict_section(verdict)
        write_comparison(compared, folder, report=options.report, config_yaml=options.config_yaml, first=section)
        return
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "resolved.yaml").write_text(options.config_yaml, encoding="utf-8")
    write_verdict_page(verdict, folder)


def _count(verdict: Verdict, outcome: str) -> int:
    return sum(result.outcome == outcome for result in verdict.results)


def _tag_run(run_id: str, name: str, value: str) -> None:
    from mlflow import MlflowClient

    with optional(f"run {run_id} could not be tagged with {name}"):
        patiently(partial(MlflowClient().set_tag, run_id, name, value), what="tagging the run")


def _verdict_tags(result: GateRun) -> dict[str, str]:
    """Return the tags of a judged version; it is undecided, to be judged again, if its baseline was replaced."""
    outcome = result.verdict.outcome
    tags = {VERDICT_TAG: "undecided" if result.outdated else outcome, f"{VERDICT_TAG}_run_id": result.run_id}
    return tags if result.outdated else {**tags, f"{VERDICT_TAG}.{result.verdict.key}": f"{outcome} {result.run_id}"}
