"""The command line: ``amici-eval COMMAND [key=value ...]``; MLproject calls the same commands."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from amici_eval import __version__
from amici_eval.cli.project_arguments import project_overrides, written_out
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
    quiet_matplotlib,
)
from amici_eval.common.errors import AmiciEvalError, InvalidSpecError
from amici_eval.common.text import mask_secrets
from amici_eval.settings.commands import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

FLAGS = {"gate": "--dry-run", "watch": "--once", "rollback": "--dry-run"}
EXIT_CRASH, EXIT_BAD_INPUT = 1, 2
_EXIT_CODE = "exit-code-"
SCRATCH_VARIABLE = "AMICI_EVAL_SWEEP_DIR"


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
    logging.getLogger("amici_eval").setLevel(logging.INFO)
    quiet_matplotlib()
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # they tell each attempt at length, with a traceback; we tell what is wrong with the store
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def _answered(body: Callable[[], int | None]) -> int:
    """Return the exit code of a body, or say what went wrong and return its code."""
    from amici_eval.tracking.store.errors import tracking_errors

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

    from amici_eval.cli.config import check_override, hydra_override, keep_texts_of_files, register_schemas

    own_configs = any(argument.startswith("--config-") or argument in ("-cd", "-cn", "-cp") for argument in arguments)
    sweep = not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.isdisjoint(arguments)
    flags, overrides, takes_value = [], [], False
    for argument in arguments:
        is_flag = takes_value or argument.startswith("-")
        takes_value = argument in (
            "--config-dir",
            "-cd",
            "--config-name",
            "-cn",
            "--config-path",
            "-cp",
            "--cfg",
            "-c",
            "--package",
            "-p",
            "--experimental-rerun",
        )
        if is_flag:
            flags.append(argument)
            continue
        plain = argument.startswith(("~", "hydra/", "hydra.")) or ("=" in argument and "/" in argument.split("=")[0])
        overrides.append(
            argument if plain else hydra_override(written_out(argument, command), sweep=sweep, command=command)
        )
        if not plain and not own_configs and not overrides[-1].startswith("+"):
            check_override(command, overrides[-1], configs=config_directory(), sweep=sweep)
    register_schemas()
    keep_texts_of_files(command)

    def task(config: DictConfig) -> None:
        # jobs of a sweep may run in processes of their own: each leaves its exit code in a file
        code = Path(os.environ[SCRATCH_VARIABLE]) / f"{_EXIT_CODE}{uuid4().hex}"
        code.write_text(str(EXIT_CRASH))
        done = _answered(lambda: _TASKS[command](config, **own_flags))
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
    # flags first: Hydra's parser takes settings from one place only
    sys.argv = ["amici-eval", *flags, *overrides]
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
    from amici_eval.cli.config import data_uri, evaluation_spec, launch_spec, report_spec, resolved_yaml, tracking_spec

    spec, report, tracking = evaluation_spec(config), report_spec(config), tracking_spec(config)
    launch = launch_spec(config)
    _set_up_process()
    from amici_eval.report.evaluation_sentences import summary_lines
    from amici_eval.tracking.jobs.evaluating import evaluate_job

    with Reporter() as progress:
        result = evaluate_job(
            config.model_uri,
            data_uri=data_uri(config),
            spec=spec,
            report=report,
            tracking=tracking,
            config_yaml=resolved_yaml(config),
            progress=progress,
            launch=launch,
        )
    _say(f"{config.model_uri}:", *summary_lines(result.evaluation), "")
    shown = mask_secrets(result.tracking_uri)
    _say(f"run {result.run_id} in {shown}", *_how_to_look(shown))
    if result.folder is not None:
        _say(f"local copy in {result.folder}")


def _compare(config: DictConfig) -> None:
    from amici_eval.cli.config import (
        comparison_spec,
        data_uri,
        evaluation_spec,
        report_spec,
        resolved_yaml,
        tracking_spec,
    )

    spec, report, tracking = evaluation_spec(config), report_spec(config), tracking_spec(config)
    comparison = comparison_spec(config)
    _set_up_process()
    from amici_eval.report.comparison_sentences import comparison_sentences
    from amici_eval.tracking.jobs.comparing import compare_job

    with Reporter() as progress:
        result = compare_job(
            models=list(config.model),
            versions=list(config.versions),
            runs=list(config.runs),
            datasets=list(config.datasets),
            data_uri=data_uri(config),
            spec=spec,
            comparison=comparison,
            report=report,
            tracking=tracking,
            config_yaml=resolved_yaml(config),
            progress=progress,
        )
    _say(*comparison_sentences(result.comparison), "")
    shown = mask_secrets(result.tracking_uri)
    _say(f"run {result.run_id} in {shown}", *_how_to_look(shown))
    if result.folder is not None:
        _say(f"local copy in {result.folder}")


def _how_to_look(tracking_uri: str) -> tuple[str, ...]:
    if tracking_uri.startswith("http"):
        return (f"look at it in the browser: {tracking_uri}",)
    return (f"look at it with: mlflow ui --backend-store-uri {tracking_uri}",)


def _register(config: DictConfig) -> None:
    from amici_eval.cli.config import data_uri, tracking_spec

    tracking = tracking_spec(config)
    from amici_eval.settings.evaluation import TrainedOnSpec
    from amici_eval.tracking.jobs.evaluating import register_job

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
    from amici_eval.cli.registry_commands import run_gate

    return run_gate(config, dry_run=dry_run, say=_say)


def _watch(config: DictConfig, *, once: bool) -> int:
    from amici_eval.cli.registry_commands import run_watch

    return run_watch(config, once=once, say=_say)


def _rollback(config: DictConfig, *, dry_run: bool) -> int:
    from amici_eval.cli.registry_commands import run_rollback

    return run_rollback(config, dry_run=dry_run, say=_say)


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
    from amici_eval.tracking.jobs.uploading import upload

    run_id = upload(Path(folders[0]))
    _say(f"run {run_id} has what the folder holds")
    return 0


def _say(*lines: str) -> None:
    for line in lines:
        sys.stdout.write(f"{cleaned(line)}\n")
    sys.stdout.flush()
