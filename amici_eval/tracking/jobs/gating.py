"""The job behind ``gate``: evaluate a version and its baseline on the same cells, judge, save, tag, promote."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import AmiciEvalError, DataError, InvalidSpecError, ModelNotFoundError
from amici_eval.common.text import markdown, mask_secrets
from amici_eval.comparison.gate import judge
from amici_eval.comparison.pipeline import compare
from amici_eval.report.verdict_files import verdict_section, verdict_sentence, write_verdict, write_verdict_page
from amici_eval.results.evaluation import HeadEvaluation
from amici_eval.settings.gate import gate_key
from amici_eval.tracking.jobs.comparing import comparison_params, write_comparison
from amici_eval.tracking.jobs.promotion import ROLLED_BACK_TAG, Promotion, promote, promoted_over
from amici_eval.tracking.jobs.version_evaluations import Column, cells_of, gather_evaluations
from amici_eval.tracking.jobs.watching import VERDICT_TAG
from amici_eval.tracking.registry import RegistryTags, connect_to, resolve_model
from amici_eval.tracking.runs.delivery import evaluation_metrics, metric_intervals, send
from amici_eval.tracking.runs.local_results import ARTIFACTS, RunRecord, checked_output, remove_local, run_folder
from amici_eval.tracking.runs.tracked import NOTE_TAG, tracked_run
from amici_eval.tracking.store.errors import optional, patiently

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pandas as pd

    from amici_eval.results.comparison import HeadComparison
    from amici_eval.results.verdict import Verdict
    from amici_eval.settings.comparison import ComparisonSpec
    from amici_eval.settings.evaluation import EvaluationSpec, ReportSpec, TrackingSpec
    from amici_eval.settings.gate import GateSpec
    from amici_eval.tracking.jobs.version_evaluations import VersionEvaluations
    from amici_eval.tracking.registry import ResolvedModel


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
    if (model.name, model.version) != (candidate.name, candidate.version) or model.name is None:
        return GateBaseline(model=model, expected=now)
    return _of_itself(candidate, baseline, now)


def _of_itself(candidate: ResolvedModel, baseline: str, now: str | None) -> GateBaseline:
    """Return the baseline of a version that is the baseline itself: the version that it replaced, if on record."""
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


logger = logging.getLogger(__name__)


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
    spec: EvaluationSpec,
    comparison: ComparisonSpec,
    gate: GateSpec,
    report: ReportSpec,
    tracking: TrackingSpec,
    config_yaml: str,
    progress: Callable[[int, int, str], None] | None = None,
    dry_run: bool = False,
    newer_only: bool = False,
) -> GateRun:
    """Judge a version by rules and against its baseline, log the verdict, and promote the version if it passes."""
    tracking_uri = connect_to(tracking)
    output = checked_output(tracking.output_dir)
    candidate = resolve_model(model_uri)
    if gate.promote is not None and (candidate.name is None or candidate.version is None):
        raise InvalidSpecError(
            value=f"gate.promote={gate.promote} with model_uri={model_uri}",
            rule="an alias belongs to a registered version",
            fix="give models:/NAME/VERSION, or leave gate.promote out",
        )
    against = baseline_of(candidate, baseline, gate.promote)
    champion, expected = against.model, against.expected
    key = gate_key(baseline=baseline, data_uri=data_uri, spec=spec, comparison=comparison, gate=gate)
    columns = [_column(one, data_uri) for one in (champion, candidate) if one is not None]
    cells = cells_of(columns, spec, comparison, data_uri, ())
    tags = {"amici_eval.kind": "gate", "amici_eval.gate_key": key}
    with (
        tracked_run(tracking, name=f"gate {columns[-1].label}", tags=tags) as run,
        run_folder(output, run.info.run_id) as folder,
    ):
        run_id, experiment_id = run.info.run_id, run.info.experiment_id
        with tempfile.TemporaryDirectory(prefix="evaluations-", dir=folder) as staging:
            found = gather_evaluations(
                columns,
                cells,
                Path(staging),
                parent=(run_id, experiment_id),
                need_moments=False,
                report=report,
                tracking=tracking,
                config_yaml=config_yaml,
                progress=progress,
            )
            places = {column.label: place for place, column in enumerate(found.columns)}
            if columns[-1].label not in places:
                why = next((one.reason for one in found.failed if one.label == columns[-1].label), "unknown reason")
                raise DataError(
                    value=f"{columns[-1].label} could not be evaluated ({why})",
                    rule="a verdict needs an evaluation of the version",
                    fix="mend that, and judge again",
                )
            evaluation = HeadEvaluation.load(found.folders[places[columns[-1].label]])
            compared, why_none = _compared(found, columns, comparison, cells.text)
            missing = () if compared is None else _missing_genes(evaluation, found.folders[0])
        verdict = judge(
            evaluation,
            gate,
            comparison=compared,
            no_comparison=why_none or against.why_none,
            metrics=evaluation_metrics(evaluation),
            intervals=metric_intervals(evaluation),
            missing_genes=missing,
            tables=_tables(evaluation),
            model={**candidate.describe(), "evaluation_run_id": found.run_ids[places[columns[-1].label]]},
            baseline=None
            if champion is None
            else {
                **champion.describe(),
                "evaluation_run_id": found.run_ids[places[columns[0].label]] if columns[0].label in places else None,
            },
            cells=cells.text,
            in_sample=_in_sample(evaluation) if compared is None else compared.in_sample,
            key=key,
            notes=(*cells.notes, *(() if compared is None else compared.notes)),
        )
        _write(verdict, compared, folder / ARTIFACTS, report=report, config_yaml=config_yaml)
        record = RunRecord(
            tracking_uri=tracking_uri,
            run_id=run_id,
            params={
                "cfg/gate.cells": cells.text,
                "cfg/gate.baseline": mask_secrets(str(baseline)),
                **comparison_params(comparison),
            },
            metrics={f"gate/{name}": float(_count(verdict, name)) for name in ("pass", "fail", "undecided")},
            tags={
                **tags,
                VERDICT_TAG: verdict.outcome,
                f"{VERDICT_TAG}_reason": verdict_sentence(verdict),
                NOTE_TAG: markdown(verdict_sentence(verdict)),
            },
        )
        record = record.with_files(folder)
        record.save(folder)
        send(folder, record, retry_s=tracking.retry_s)
        promotion, outdated = None, False
        if verdict.passed and gate.promote is not None and candidate.name and candidate.version:
            held_back = _held_back(candidate, expected, gate.promote) if newer_only else None
            promotion = (
                promote(
                    candidate.name,
                    candidate.version,
                    alias=gate.promote,
                    expected=expected,
                    run_id=run_id,
                    dry_run=dry_run,
                )
                if held_back is None
                else held_back
            )
            # the alias should have moved to this version and did not: somebody else moved it
            wanted = held_back is None and promotion.replaced != candidate.version
            outdated = wanted and not promotion.moved and not (dry_run and promotion.replaced == expected)
            _tag_run(run_id, "amici_eval.promotion", promotion.reason)
        result = GateRun(
            verdict=verdict,
            run_id=run_id,
            tracking_uri=tracking_uri,
            folder=folder if tracking.keep_local else None,
            promotion=promotion,
            outdated=outdated,
        )
        if not dry_run:
            _tag_version(candidate, result, final=not outdated)
    if not tracking.keep_local:
        remove_local(folder, with_parent=output.made)
    return result


def _column(model: ResolvedModel, data_uri: str | None) -> Column:
    label = f"{model.name} {model.version}" if model.name else model.model_id or model.uri
    return Column(label=label, model=model, data_uri=data_uri)


def _compared(
    found: VersionEvaluations, columns: list[Column], spec: ComparisonSpec, cells: str
) -> tuple[HeadComparison | None, str | None]:
    """Return the comparison with the baseline, or why there is none although there is a baseline."""
    if len(columns) < 2:
        return None, None
    if len(found.folders) < 2:
        why = next((one.reason for one in found.failed if one.label == columns[0].label), "unknown reason")
        return None, f"the baseline could not be evaluated: {why}"
    try:
        return (
            compare(
                found.folders,
                spec,
                labels=[column.label for column in found.columns],
                run_ids=found.run_ids,
                reused=found.reused,
                cells=cells,
            ),
            None,
        )
    except AmiciEvalError as error:
        logger.error("the version could not be compared with its baseline: %s", error)
        return None, f"it could not be compared with the baseline: {error}"


def _missing_genes(evaluation: HeadEvaluation, baseline: Path) -> tuple[str, ...]:
    """Return genes of the baseline that the version lacks."""
    there = set(evaluation.genes)
    return tuple(name for name in HeadEvaluation.load(baseline).genes if name not in there)


def _held_back(model: ResolvedModel, now: str | None, alias: str) -> Promotion | None:
    """Return a refused promotion if a version is older than the alias's or was rolled back; ``None``: promote it."""
    assert model.name is not None  # noqa: S101, RUF100 - for the type checker
    assert model.version is not None  # noqa: S101, RUF100 - for the type checker
    reason = None
    if now == model.version:
        return None
    if now is not None and int(model.version) < int(now):
        reason = f"version {model.version} is older than version {now}, which is {alias}: not promoted"
    elif f"{ROLLED_BACK_TAG}.{alias}" in RegistryTags(name=model.name, version=model.version).read():
        reason = f"the promotion of version {model.version} to {alias} was taken back: not promoted again"
    if reason is None:
        return None
    return Promotion(name=model.name, alias=alias, version=model.version, replaced=now, moved=False, reason=reason)


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


def _write(
    verdict: Verdict, compared: HeadComparison | None, folder: Path, *, report: ReportSpec, config_yaml: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # write the verdict before anything is drawn: drawing may fail
    write_verdict(verdict, folder)
    if compared is not None:
        section = verdict_section(verdict)
        write_comparison(compared, folder, report=report, config_yaml=config_yaml, first=section)
        return
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "resolved.yaml").write_text(config_yaml, encoding="utf-8")
    write_verdict_page(verdict, folder)


def _count(verdict: Verdict, outcome: str) -> int:
    return sum(result.outcome == outcome for result in verdict.results)


def _tag_run(run_id: str, name: str, value: str) -> None:
    from mlflow import MlflowClient

    with optional(f"run {run_id} could not be tagged with {name}"):
        patiently(partial(MlflowClient().set_tag, run_id, name, value), what="tagging the run")


def _tag_version(model: ResolvedModel, result: GateRun, *, final: bool) -> None:
    """Tag a version with its verdict; one that is not ``final`` is tagged as undecided, so that it is judged again."""
    from mlflow import MlflowClient

    if model.name is None or model.version is None:
        return
    values: dict[str, Any] = {
        VERDICT_TAG: result.verdict.outcome if final else "undecided",
        f"{VERDICT_TAG}_run_id": result.run_id,
    }
    if final:
        values[f"{VERDICT_TAG}.{result.verdict.key}"] = f"{result.verdict.outcome} {result.run_id}"
    client = MlflowClient()
    with optional(f"version {model.version} could not be tagged with its verdict"):
        for name, value in values.items():
            tag = partial(client.set_model_version_tag, model.name, model.version, name, value)
            patiently(tag, what="tagging the version")
