"""Commands that act on the registry: ``gate`` judges a version, ``watch`` each new one, ``rollback`` takes one back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amici_eval.cli.config import (
    comparison_spec,
    data_uri,
    evaluation_spec,
    gate_spec,
    report_spec,
    resolved_yaml,
    tracking_spec,
)
from amici_eval.cli.terminal import Reporter, append_for_ci, pause
from amici_eval.common.text import markdown, mask_secrets

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig

_BAD, _REFUSED, _UNDECIDED = 2, 3, 4
_AGAIN = 3
"""How often a watcher judges a version whose baseline is replaced meanwhile."""


def run_gate(config: DictConfig, *, dry_run: bool, say: Callable[..., None]) -> int:
    """Judge a version, print the verdict, and promote the version if that is asked for."""
    settings, report, tracking = _gate_settings(config), report_spec(config), tracking_spec(config)
    from amici_eval.report.verdict_files import verdict_lines, verdict_markdown
    from amici_eval.tracking.jobs.gating import gate_job

    with Reporter() as progress:
        run = gate_job(
            model_uri=config.model_uri,
            **settings,
            report=report,
            tracking=tracking,
            config_yaml=resolved_yaml(config),
            progress=progress,
            dry_run=dry_run,
        )
    promotion = [] if run.promotion is None else ["", run.promotion.reason]
    say(*verdict_lines(run.verdict), *promotion, "")
    summary = verdict_markdown(run.verdict) + "".join(f"{markdown(line)}\n" for line in promotion)
    append_for_ci("GITHUB_STEP_SUMMARY", f"{summary}\n")
    say(f"run {run.run_id} in {mask_secrets(run.tracking_uri)}")
    if run.folder is not None:
        say(f"local copy in {run.folder}")
    if run.outdated:
        return _UNDECIDED
    return {"pass": 0, "fail": _REFUSED, "undecided": _UNDECIDED}[run.verdict.outcome]


def _gate_settings(config: DictConfig) -> dict[str, Any]:
    """Return what a verdict depends on besides the version."""
    return {
        "baseline": config.baseline,
        "data_uri": data_uri(config),
        "spec": evaluation_spec(config),
        "comparison": comparison_spec(config),
        "gate": gate_spec(config),
    }


def run_rollback(config: DictConfig, *, dry_run: bool, say: Callable[..., None]) -> int:
    """Take back the last promotion to an alias."""
    tracking = tracking_spec(config)
    from amici_eval.tracking.jobs.promotion import rollback
    from amici_eval.tracking.registry import connect

    connect(tracking.uri, retry_s=tracking.retry_s)
    done = rollback(config.model, config.alias, dry_run=dry_run)
    say(f"{config.model}: {done.reason}")
    return 0 if done.moved or dry_run else _BAD


def run_watch(config: DictConfig, *, once: bool, say: Callable[..., None]) -> int:
    """Judge all versions of a model that have no verdict for these settings, once or for ever."""
    settings, report, tracking = _gate_settings(config), report_spec(config), tracking_spec(config)
    from amici_eval.settings.gate import gate_key
    from amici_eval.tracking.jobs.watching import watch
    from amici_eval.tracking.registry import connect_to

    uri = mask_secrets(connect_to(tracking))
    key = gate_key(**settings)

    def judge(model_uri: str) -> str:
        from amici_eval.tracking.jobs.gating import gate_job

        for _ in range(_AGAIN):
            with Reporter() as progress:
                run = gate_job(
                    model_uri=model_uri,
                    **settings,
                    report=report,
                    tracking=tracking,
                    config_yaml=resolved_yaml(config),
                    progress=progress,
                    newer_only=True,
                )
            if run.promotion is not None:
                say(f"{model_uri}: {run.promotion.reason}")
            if not run.outdated:
                break
        say(f"{model_uri}: {run.verdict.outcome} (run {run.run_id})")
        return str(run.verdict.outcome)

    say(f"watching {config.model} in {uri}, configuration {key}")
    done = watch(
        config.model,
        key=key,
        judge=judge,
        once=once,
        lease_s=config.watch.lease,
        interval_s=config.watch.interval,
        max_interval_s=config.watch.max_interval,
        pause=pause,
    )
    for one in (*done.skipped, *done.failed):
        say(f"models:/{config.model}/{one.version}: {one.state}: {one.said}")
    if not done.versions:
        say("nothing to judge")
    return _BAD if done.failed else 0
