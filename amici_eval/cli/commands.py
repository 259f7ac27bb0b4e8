"""The command line: ``amici-eval COMMAND [key=value ...]``; MLproject calls the same commands."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from amici_eval import __version__
from amici_eval.cli.terminal import (
    Reporter,
    TerminatedError,
    append_for_ci,
    catch_signals,
    check_temporary_folder,
    cleaned,
    forget_signals,
    guard_logs,
    guarded_streams,
    pause,
    quiet_matplotlib,
)
from amici_eval.common.errors import AmiciEvalError, InvalidSpecError
from amici_eval.common.text import markdown, mask_secrets
from amici_eval.settings.commands import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig

    from amici_eval.tracking.jobs.comparing import ComparisonRun
    from amici_eval.tracking.jobs.evaluating import EvaluationRun
    from amici_eval.tracking.jobs.gating import GateRun

logger = logging.getLogger(__name__)

FLAGS = {"gate": "--dry-run", "watch": "--once", "rollback": "--dry-run"}
EXIT_CRASH, EXIT_BAD_INPUT, EXIT_REFUSED, EXIT_UNDECIDED = 1, 2, 3, 4
_EXIT_CODE = "exit-code-"
SCRATCH_VARIABLE = "AMICI_EVAL_SWEEP_DIR"
_TIMES_JUDGED = 3
"""How often a watcher judges a version whose baseline is replaced meanwhile."""


def main(argv: list[str] | None = None) -> None:
    """Run a command, and exit.

    0: success, or a version passed; 1: anything unforeseen; 2: bad input; 3: a version is refused; 4: it is undecided;
    130 or 143: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    helped = not {"--help", "-h"}.isdisjoint(arguments)
    if not arguments or helped or arguments[0] == "help":
        from amici_eval.cli.help import help_of, overview

        asked = next((one for one in arguments if one in COMMANDS), None)
        _show(overview() if asked is None else help_of(asked, config_directory()))
        sys.exit(0 if arguments else EXIT_BAD_INPUT)
    if arguments[0] == "--version":
        _show(__version__)
        sys.exit(0)
    command, rest = arguments[0], arguments[1:]
    forget_signals()
    _set_up_process()
    try:
        with guarded_streams():
            code = _answered(lambda: _run(command, rest))
    except KeyboardInterrupt as interrupt:
        code = 143 if isinstance(interrupt, TerminatedError) else 130
        sys.stderr.write("amici-eval: interrupted; the same command again takes up what is finished\n")
    sys.exit(code)


def _show(text: str) -> None:
    """Print a text; a reader that has seen enough of it, such as ``head``, is no error."""
    try:
        print(text, flush=True)  # noqa: T201, RUF100
    except BrokenPipeError:
        # else the interpreter complains when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _set_up_process() -> None:
    catch_signals()
    # at its end the interpreter would search the hundreds of thousands of objects of the packages, for seconds
    atexit.register(gc.freeze)
    # MLflow's default retries keep a user waiting for minutes when a server is gone
    # tracking.retry_s says how long we ask again
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    guard_logs()
    own = logging.getLogger("amici_eval")
    # hydra.verbose sets another
    own.setLevel(own.level or logging.INFO)
    quiet_matplotlib()
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # they tell each attempt at length, with a traceback; we tell what is wrong with the store
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def _answered(body: Callable[[], int | None]) -> int:
    """Return the exit code of a body, or say what went wrong and return its code."""
    from amici_eval.tracking.store import tracking_errors

    try:
        with tracking_errors():
            return body() or 0
    except AmiciEvalError as error:
        said, code = str(error), EXIT_BAD_INPUT
    except _JobsFailedError:
        raise
    except Exception as error:  # noqa: BLE001, RUF100 - the outermost frame
        said, code = _own_fault(error), EXIT_CRASH
    sys.stderr.write(cleaned(f"amici-eval: {said}\n"))
    return code


def _own_fault(error: Exception) -> str:
    """Keep the traceback of an error that nothing here foresaw in a file, and return what to say."""
    said = f"{type(error).__name__}: {error}: this is a fault of amici_eval, not of your input; please report it"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="amici-eval-fault-", suffix=".txt", delete=False) as file:
            file.write(cleaned("".join(traceback.format_exception(error))))
    except OSError:
        return said
    return f"{said} with {file.name}"


class _JobsFailedError(Exception):
    """Of a sweep: Hydra notes which job failed and goes on with the others."""


def _run(command: str, rest: list[str]) -> int:
    check_temporary_folder()
    if command == "project":
        # the entry points of MLproject come in as `project COMMAND --key value ...`
        if not rest:
            raise InvalidSpecError(value="project", rule="it needs a command", fix="see amici-eval --help")
        from amici_eval.cli.config import project_overrides

        command, rest = rest[0], project_overrides(rest[1:], rest[0])
    if command == "upload":
        return _upload(rest)
    if command not in COMMANDS:
        raise InvalidSpecError(
            value=f"unknown command {command!r}",
            rule=f"commands are {', '.join((*COMMANDS, 'upload'))}",
            fix="see amici-eval --help",
        )
    flag = FLAGS.get(command)
    flags = {} if flag is None else {flag.strip("-").replace("-", "_"): flag in rest}
    return _run_hydra(command, [argument for argument in rest if argument != flag], flags)


def config_directory() -> Path:
    """Return the folder of the configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _run_hydra(command: str, arguments: list[str], own_flags: dict[str, bool]) -> int:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from amici_eval.cli.config import hydra_arguments, keep_texts_of_files, register_schemas

    sweep = not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.isdisjoint(arguments)
    read = hydra_arguments(command, arguments, configs=config_directory(), sweep=sweep)
    register_schemas()
    keep_texts_of_files(command)

    def task(config: DictConfig) -> None:
        # jobs of a sweep may run in processes of their own: each leaves its exit code in a file
        code = Path(os.environ[SCRATCH_VARIABLE]) / f"{_EXIT_CODE}{uuid4().hex}"
        code.write_text(str(EXIT_CRASH))

        def body() -> int | None:
            _set_up_process()
            return _TASKS[command](config, **own_flags)

        done = _answered(body)
        code.write_text(str(done))
        if sweep and done in (EXIT_CRASH, EXIT_BAD_INPUT):
            msg = f"exit code {done}"
            raise _JobsFailedError(msg)

    # Hydra writes multirun.yaml with the whole configuration into the folder of a sweep
    scratch = tempfile.TemporaryDirectory(prefix="amici-eval-sweep-")
    os.environ[SCRATCH_VARIABLE] = scratch.name
    before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # else Hydra prints errors itself, with advice on its own traceback
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = ["amici-eval", *read]
    try:
        hydra.main(config_path=str(config_directory()), config_name=command, version_base="1.3")(task)()
    except BaseException as end:
        if sweep:
            from amici_eval.tracking.sweep import close_parent

            close_parent("KILLED" if isinstance(end, KeyboardInterrupt) else "FAILED")
        # Hydra exits with 1 for settings that it refuses itself, before any job
        if isinstance(end, _JobsFailedError) or (isinstance(end, SystemExit) and end.code == 1):
            return _worst(scratch.name, none=EXIT_BAD_INPUT)
        if isinstance(end, (HydraException, OmegaConfBaseException)):
            raise InvalidSpecError(
                value=" ".join(f"{end} {end.__cause__ or ''}".split()),
                rule="settings are those of amici-eval COMMAND --help",
                fix="correct the setting",
            ) from end
        raise
    else:
        return _worst(scratch.name, none=0)
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error
        os.environ.pop(SCRATCH_VARIABLE, None)
        scratch.cleanup()


def _worst(folder: str, *, none: int) -> int:
    """Return the exit code of the jobs that ran: a crash counts most, then bad input, refused, undecided."""
    codes = [int(path.read_text()) for path in Path(folder).glob(f"{_EXIT_CODE}*")]
    return min(codes, key=lambda code: (code == 0, code), default=none)


def _evaluate(config: DictConfig) -> None:
    from amici_eval.cli.config import data_uri, job_options

    # settings are checked before packages are imported that take seconds
    options = job_options(config)
    from amici_eval.report.evaluation_sentences import summary_lines
    from amici_eval.tracking.jobs.evaluating import evaluate_job

    with Reporter() as progress:
        options = replace(options, progress=progress)
        result = evaluate_job(config.model_uri, data_uri=data_uri(config), options=options)
    _say(f"{config.model_uri}:", *summary_lines(result.evaluation), "")
    _say_where(result, how_to_look=True)


def _compare(config: DictConfig) -> None:
    from amici_eval.cli.config import comparison_spec, data_uri, job_options

    options, comparison = job_options(config), comparison_spec(config)
    from amici_eval.report.comparison_sentences import comparison_sentences
    from amici_eval.tracking.jobs.comparing import compare_job

    with Reporter() as progress:
        result = compare_job(
            models=list(config.model),
            versions=list(config.versions),
            runs=list(config.runs),
            datasets=list(config.datasets),
            data_uri=data_uri(config),
            comparison=comparison,
            options=replace(options, progress=progress),
        )
    _say(*comparison_sentences(result.comparison), "")
    _say_where(result, how_to_look=True)


def _say_where(result: EvaluationRun | ComparisonRun | GateRun, *, how_to_look: bool = False) -> None:
    """Say in which run and folder the results are."""
    shown = mask_secrets(result.tracking_uri)
    _say(f"run {result.run_id} in {shown}")
    if how_to_look and shown.startswith("http"):
        _say(f"look at it in the browser: {shown}")
    elif how_to_look:
        _say(f"look at it with: mlflow ui --backend-store-uri {shown}")
    if result.folder is not None:
        _say(f"local copy in {result.folder}")


def _register(config: DictConfig) -> None:
    from amici_eval.cli.config import data_uri, tracking_spec
    from amici_eval.settings.evaluation import TrainedOnSpec
    from amici_eval.tracking.jobs.evaluating import register_job

    tracking = tracking_spec(config)
    if config.register.trust:
        logger.warning("register.trust=true: unpickling %s runs whatever code the file holds", config.model_dir)
    version = register_job(
        config.model_dir,
        name=config.name,
        data_uri=data_uri(config),
        adata=config.register.adata,
        trust=config.register.trust,
        alias=config.register.alias,
        # a group data=mine says it for all commands
        trained_on=TrainedOnSpec(**config.register.trained_on) or TrainedOnSpec(**config.data.trained_on),
        tracking=tracking,
    )
    _say(
        f"registered {version.uri} (logged model {version.model_id}, run {version.run_id})",
        f"evaluate it with: amici-eval evaluate model_uri={version.uri}"
        + (f" tracking.uri={mask_secrets(tracking.uri)}" if tracking.uri else ""),
    )
    outputs = {"version": version.version, "model_uri": version.uri, "run_id": version.run_id}
    # a line break in a name would be read as further outputs
    lines = [f"{name}={value}\n" for name, value in outputs.items() if value.isprintable()]
    append_for_ci("GITHUB_OUTPUT", "".join(lines))


def _demo(config: DictConfig) -> None:
    from amici_eval.cli.config import tracking_spec
    from amici_eval.cli.demo import run_demo

    run_demo(
        seed=config.seed,
        output_dir=Path(config.output_dir),
        n_permutations=config.n_permutations,
        tracking=tracking_spec(config),
        say=_say,
    )


def _gate(config: DictConfig, *, dry_run: bool) -> int:
    """Judge a version, print the verdict, and promote the version if that is asked for."""
    from amici_eval.cli.config import job_options, judged_by

    options, settings = job_options(config), judged_by(config)
    from amici_eval.report.verdict_files import verdict_lines, verdict_markdown
    from amici_eval.tracking.jobs.gating import gate_job

    with Reporter() as progress:
        options = replace(options, progress=progress)
        run = gate_job(model_uri=config.model_uri, **settings, options=options, dry_run=dry_run)
    promotion = [] if run.promotion is None else ["", run.promotion.reason]
    _say(*verdict_lines(run.verdict), *promotion, "")
    summary = verdict_markdown(run.verdict) + "".join(f"{markdown(line)}\n" for line in promotion)
    append_for_ci("GITHUB_STEP_SUMMARY", f"{summary}\n")
    _say_where(run)
    if run.outdated:
        return EXIT_UNDECIDED
    return {"pass": 0, "fail": EXIT_REFUSED, "undecided": EXIT_UNDECIDED}[run.verdict.outcome]


def _watch(config: DictConfig, *, once: bool) -> int:
    """Judge all versions of a model that have no verdict for these settings, once or for ever."""
    from amici_eval.cli.config import job_options, judged_by
    from amici_eval.settings.comparison import gate_key
    from amici_eval.tracking.jobs.watching import watch
    from amici_eval.tracking.registry import connect_to

    settings, options = judged_by(config), job_options(config)
    uri = mask_secrets(connect_to(options.tracking))
    key = gate_key(**settings, spec=options.spec)

    def judge(model_uri: str) -> str:
        from amici_eval.tracking.jobs.gating import gate_job

        for _ in range(_TIMES_JUDGED):
            with Reporter() as progress:
                own = replace(options, progress=progress)
                run = gate_job(model_uri=model_uri, **settings, options=own, newer_only=True)
            if run.promotion is not None:
                _say(f"{model_uri}: {run.promotion.reason}")
            if not run.outdated:
                break
        _say(f"{model_uri}: {run.verdict.outcome} (run {run.run_id})")
        return str(run.verdict.outcome)

    _say(f"watching {config.model} in {uri}, configuration {key}")
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
        _say(f"models:/{config.model}/{one.version}: {one.state}: {one.said}")
    if not done.versions:
        _say("nothing to judge")
    return EXIT_BAD_INPUT if done.failed else 0


def _rollback(config: DictConfig, *, dry_run: bool) -> int:
    """Take back the last promotion to an alias."""
    from amici_eval.cli.config import tracking_spec
    from amici_eval.tracking.jobs.promotion import rollback
    from amici_eval.tracking.registry import connect

    tracking = tracking_spec(config)
    connect(tracking.uri, retry_s=tracking.retry_s)
    done = rollback(config.model, config.alias, dry_run=dry_run)
    _say(f"{config.model}: {done.reason}")
    return 0 if done.moved or dry_run else EXIT_BAD_INPUT


_TASKS: dict[str, Callable[..., int | None]] = {
    "evaluate": _evaluate,
    "compare": _compare,
    "gate": _gate,
    "watch": _watch,
    "rollback": _rollback,
    "register": _register,
    "demo": _demo,
}


def _upload(rest: list[str]) -> int:
    folders = [argument for argument in rest if not argument.startswith("-")]
    settings = [argument for argument in folders if "=" in argument and not Path(argument).exists()]
    if settings:
        raise InvalidSpecError(
            value=f"upload with {settings[0]}",
            rule="it takes no settings: the folder says where its run is",
            fix="leave it out; credentials, or another address of the store, come from MLFLOW_TRACKING_URI",
        )
    if len(folders) != 1:
        raise InvalidSpecError(
            value=f"upload with {len(folders)} folders", rule="it takes one folder", fix="amici-eval upload DIR"
        )
    from amici_eval.tracking.jobs.evaluating import upload

    run_id = upload(Path(folders[0]))
    _say(f"run {run_id} has what the folder holds")
    return 0


def _say(*lines: str) -> None:
    for line in lines:
        sys.stdout.write(f"{cleaned(line)}\n")
    sys.stdout.flush()
