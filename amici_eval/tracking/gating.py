"""The job behind ``gate``: evaluate a version and its baseline on the same cells, judge, keep, tag, promote."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amici_eval.comparison import compare
from amici_eval.errors import AmiciEvalError, DataError, InvalidSpecError, ModelNotFoundError, first_line
from amici_eval.gate import judge
from amici_eval.gate_spec import gate_key
from amici_eval.report.verdict_files import verdict_section, verdict_sentence, write_verdict, write_verdict_page
from amici_eval.results import HeadEvaluation
from amici_eval.tracking.compared_cells import Column, cells_of
from amici_eval.tracking.comparison_contents import comparison_params, write_comparison
from amici_eval.tracking.gathering import gather_evaluations
from amici_eval.tracking.promotion import promote
from amici_eval.tracking.registry import connect, resolve_model
from amici_eval.tracking.run_contents import evaluation_metrics
from amici_eval.tracking.run_log import ARTIFACTS, RunRecord, check_writable, remove_local, send
from amici_eval.tracking.tracked_run import tracked_run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pandas as pd

    from amici_eval.comparison_results import HeadComparison
    from amici_eval.comparison_spec import ComparisonSpec
    from amici_eval.gate_spec import GateSpec
    from amici_eval.specs import EvaluationSpec, ReportSpec, TrackingSpec
    from amici_eval.tracking.gathering import Gathered
    from amici_eval.tracking.promotion import Promotion
    from amici_eval.tracking.registry import ResolvedModel
    from amici_eval.verdict import Verdict

__all__ = ["VERDICT_TAG", "GateRun", "gate_job"]

logger = logging.getLogger(__name__)

VERDICT_TAG = "amici_eval.verdict"


@dataclass(frozen=True, kw_only=True)
class GateRun:
    """A verdict and where it was logged.

    Parameters
    ----------
    verdict
        The result.
    run_id, tracking_uri
        The run.
    folder
        Local copy of its artifacts, if it was kept.
    promotion
        What became of the alias; ``None`` if none was to be moved.
    """

    verdict: Verdict
    run_id: str
    tracking_uri: str
    folder: Path | None
    promotion: Promotion | None = None

    @property
    def outdated(self) -> bool:
        """Whether the baseline was replaced meanwhile, so that the version must be judged again."""
        aliased = self.promotion
        return self.verdict.passed and aliased is not None and not aliased.moved and aliased.replaced != aliased.version


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
) -> GateRun:
    """Judge a version by rules and against its baseline, log the verdict, and promote the version if it passes.

    Parameters
    ----------
    model_uri
        The version, as for :func:`~amici_eval.tracking.registry.resolve_model`.
    baseline
        ``@alias`` or a version number of the same registered model, a model URI, or ``None``. An alias that is not set
        is no baseline yet.
    data_uri
        The tissue; ``None``: what the baseline, or else the version, brings.
    spec, comparison, gate, report, tracking
        Settings. Evaluations that the store holds already are taken from there; missing ones become children of the
        run.
    config_yaml
        The resolved configuration, kept with the run.
    progress
        Told how far the work is.
    dry_run
        Say which alias would be moved, and move none.

    Raises
    ------
    AmiciEvalError
        If the version cannot be evaluated, or something is misspelt; before the run starts where that can be known.
    """
    tracking_uri = connect(tracking.uri)
    output = Path(tracking.output_dir).absolute()
    made_output = not output.exists()
    check_writable(output)
    candidate = resolve_model(model_uri)
    if gate.promote is not None and (candidate.name is None or candidate.version is None):
        raise InvalidSpecError(
            value=f"gate.promote={gate.promote} with model_uri={model_uri}",
            rule="an alias belongs to a registered version",
            fix="give models:/NAME/VERSION, or leave gate.promote out",
        )
    champion = _baseline(candidate, baseline)
    # the version that was judged against is the one that may be replaced, whatever has become of the alias meanwhile
    own = gate.promote is not None and baseline == f"@{gate.promote}"
    expected = (champion.version if champion else None) if own else _aliased(candidate, gate.promote)
    key = gate_key(baseline=baseline, data_uri=data_uri, spec=spec, comparison=comparison, gate=gate)
    columns = [_column(one, data_uri) for one in (champion, candidate) if one is not None]
    if champion is not None and columns[0].label == columns[1].label:
        # a version that has the alias already is not worse than itself
        columns[0] = Column(label=f"{columns[0].label} (baseline)", model=champion, data_uri=data_uri)
    cells = cells_of(columns, spec, comparison, data_uri, ())
    tags = {"amici_eval.kind": "gate", "amici_eval.gate_key": key}
    with tracked_run(tracking, name=f"gate {columns[-1].label}", tags=tags) as run:
        run_id, experiment_id = run.info.run_id, run.info.experiment_id
        folder = output / run_id
        check_writable(folder)
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
        verdict = judge(
            evaluation,
            gate,
            comparison=compared,
            no_comparison=why_none,
            metrics=evaluation_metrics(evaluation),
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
            notes=cells.notes,
        )
        _write(verdict, compared, folder / ARTIFACTS, report=report, config_yaml=config_yaml)
        record = RunRecord(
            tracking_uri=tracking_uri,
            run_id=run_id,
            params={"cfg/gate.cells": cells.text, "cfg/gate.baseline": str(baseline), **comparison_params(comparison)},
            metrics={f"gate/{name}": float(_count(verdict, name)) for name in ("pass", "fail", "undecided")},
            tags={
                **tags,
                VERDICT_TAG: verdict.outcome,
                f"{VERDICT_TAG}_reason": verdict_sentence(verdict),
                "mlflow.note.content": verdict_sentence(verdict),
            },
        )
        record.save(folder)
        send(folder, record)
        promotion = None
        if verdict.passed and gate.promote is not None and candidate.name and candidate.version:
            promotion = promote(
                candidate.name,
                candidate.version,
                alias=gate.promote,
                expected=expected,
                run_id=run_id,
                dry_run=dry_run,
            )
            _tag_run(run_id, "amici_eval.promotion", promotion.reason)
        result = GateRun(
            verdict=verdict,
            run_id=run_id,
            tracking_uri=tracking_uri,
            folder=folder if tracking.keep_local else None,
            promotion=promotion,
        )
        _tag_version(candidate, result, final=dry_run or not result.outdated)
    if not tracking.keep_local:
        remove_local(folder, with_parent=made_output)
    return result


def _baseline(candidate: ResolvedModel, baseline: str | None) -> ResolvedModel | None:
    """Return the version to judge against; ``None`` while its alias is not set."""
    if baseline is None:
        return None
    if baseline.startswith("@") or baseline.isdecimal():
        if candidate.name is None:
            raise InvalidSpecError(
                value=f"baseline={baseline} with model_uri={candidate.asked}",
                rule="an alias or a number names a version of the same registered model",
                fix="give models:/NAME/VERSION as model_uri, or a whole URI as baseline",
            )
        if baseline.startswith("@") and _aliased(candidate, baseline[1:]) is None:
            return None
        separator = "" if baseline.startswith("@") else "/"
        return resolve_model(f"models:/{candidate.name}{separator}{baseline}")
    return resolve_model(baseline)


def _aliased(model: ResolvedModel, alias: str | None) -> str | None:
    """Return the version that an alias of the registered model points to."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if alias is None or model.name is None:
        return None
    try:
        found = MlflowClient().get_registered_model(model.name).aliases.get(alias)
    except MlflowException as error:
        raise ModelNotFoundError(
            value=f"registered model {model.name!r} cannot be read ({first_line(error)})",
            rule="its aliases say what the baseline is",
            fix="check tracking.uri and your credentials",
        ) from error
    return None if found is None else str(found)


def _column(model: ResolvedModel, data_uri: str | None) -> Column:
    label = f"{model.name} {model.version}" if model.name else model.model_id or model.uri
    return Column(label=label, model=model, data_uri=data_uri)


def _compared(
    found: Gathered, columns: list[Column], spec: ComparisonSpec, cells: str
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


def _in_sample(evaluation: HeadEvaluation) -> bool | None:
    """Return whether some evaluated cell was one the model was fitted on; ``None``: not known."""
    if False in evaluation.held_out:
        return True
    return None if None in evaluation.held_out or not evaluation.held_out else False


def _tables(evaluation: HeadEvaluation) -> Callable[[str], pd.DataFrame]:
    """Return what gives a table of the run by its name."""
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
    # the verdict first, before anything is drawn
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
    from mlflow.exceptions import MlflowException

    try:
        MlflowClient().set_tag(run_id, name, value)
    except MlflowException as error:
        logger.warning("run %s could not be tagged with %s: %s", run_id, name, first_line(error))


def _tag_version(model: ResolvedModel, result: GateRun, *, final: bool) -> None:
    """Let the version say how it was judged; a verdict that is outdated already is none for its configuration."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if model.name is None or model.version is None:
        return
    values: dict[str, Any] = {
        VERDICT_TAG: result.verdict.outcome if final else "undecided",
        f"{VERDICT_TAG}_run_id": result.run_id,
    }
    if final:
        values[f"{VERDICT_TAG}.{result.verdict.key}"] = f"{result.verdict.outcome} {result.run_id}"
    client = MlflowClient()
    try:
        for name, value in values.items():
            client.set_model_version_tag(model.name, model.version, name, value)
    except MlflowException as error:
        # a user may read a model and not write to it; the run itself is complete
        logger.warning("version %s could not be tagged with its verdict: %s", model.version, first_line(error))
