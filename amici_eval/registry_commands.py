"""Commands that act on the registry: ``watch`` judges versions as they come, ``rollback`` takes a promotion back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from amici_eval.config import comparison_spec, evaluation_spec, report_spec, resolved_yaml, tracking_spec
from amici_eval.errors import mask_secrets
from amici_eval.terminal import Reporter, pause

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig

__all__ = ["run_rollback", "run_watch"]

_BAD = 2


def run_rollback(config: DictConfig, *, dry_run: bool, say: Callable[..., None]) -> int:
    """Take back the last promotion to an alias.

    Parameters
    ----------
    config
        Of the command ``rollback``.
    dry_run
        Say what would be done, and change nothing.
    say
        Prints lines.

    Returns
    -------
    int
        The exit code: 2 if the alias could not be moved.
    """
    tracking = tracking_spec(config)
    from amici_eval.tracking.promotion import rollback
    from amici_eval.tracking.registry import connect

    connect(tracking.uri)
    done = rollback(config.model, config.alias, dry_run=dry_run)
    say(f"{config.model}: {done.reason}")
    return 0 if done.moved or dry_run else _BAD


def run_watch(config: DictConfig, *, once: bool, say: Callable[..., None]) -> int:
    """Judge all versions of a model that have no verdict for these settings, once or for ever.

    Parameters
    ----------
    config
        Of the command ``watch``.
    once
        One round; else until an interrupt.
    say
        Prints lines.

    Returns
    -------
    int
        The exit code: 2 if a version could not be judged.
    """
    spec, report, tracking = evaluation_spec(config), report_spec(config), tracking_spec(config)
    settings = {
        "baseline": config.baseline,
        "data_uri": config.data.uri,
        "spec": spec,
        "comparison": comparison_spec(config),
        "gate": OmegaConf.select(config, "gate"),
    }
    from amici_eval.tracking.gating import gate_key
    from amici_eval.tracking.registry import connect
    from amici_eval.tracking.watching import watch

    uri = mask_secrets(connect(tracking.uri))
    key = gate_key(**settings)

    def judge(model_uri: str) -> str:
        from amici_eval.tracking.gating import gate_job

        with Reporter() as progress:
            run = gate_job(
                model_uri=model_uri,
                **settings,
                report=report,
                tracking=tracking,
                config_yaml=resolved_yaml(config),
                progress=progress,
            )
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
