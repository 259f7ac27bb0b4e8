"""The command line: ``amici-eval COMMAND [key=value ...]``; MLproject calls the same commands."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amici_eval import __version__
from amici_eval.errors import AmiciEvalError, InvalidSpecError, mask_secrets

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig

__all__ = ["main"]

logger = logging.getLogger(__name__)

HELP = """\
amici-eval: which attention heads of a trained AMICI model carry cell-cell communication signal, and how sure is that

usage: amici-eval COMMAND [key=value ...] [hydra flags]

commands
  evaluate  model_uri=models:/NAME/VERSION [data.uri=FILE]   evaluate the heads of a registered model, log to MLflow
  register  model_dir=DIR name=NAME data.uri=FILE            register what AMICI.save(...) wrote (unpickles model.pt)
  upload    DIR                                              finish a run whose tracking server failed half way
  demo                                                       simulate a tissue, train, register, evaluate

settings (show all with: amici-eval COMMAND --cfg job)
  data.uri, data.subset.key/value, data.sample_key, ...      which tissue, which receivers; all cells stay neighbours
  data.backed=true|false                                     whether expression stays on disk (if the file is large)
  ablation.device=auto|cpu|cuda|cuda:N|mps                   where it runs
  ablation.engine=factored|hooked                            all heads from one pass, or hooks on the attention (slow)
  ablation.modes=[keep_one,shapley,...]                      how heads are taken away (all ways)
  ablation.memory_budget=4GB                                 for tables and chunks (a quarter of the free memory)
  permutation.n_permutations, .alpha, .seed, .convention     the test
  permutation.sampling=independent|cyclic                    how permutations are drawn
  report.figures, .formats, .n_top_genes, .cell_types        what is drawn
  tracking.uri, .experiment, .output_dir, .keep_local        where it is logged

hydra flags
  -m, --multirun       run once per value: amici-eval evaluate -m model_uri=models:/a/1,models:/a/2
  --config-dir DIR     add a folder of your own configs
  --cfg job            print the configuration and stop

  --version, --help
"""

COMMANDS = ("evaluate", "register", "demo")
EXIT_BAD_INPUT = 2
SCRATCH_VARIABLE = "AMICI_EVAL_SWEEP_DIR"
_LOG_SECONDS = 10.0


def main(argv: list[str] | None = None) -> None:
    """Run a command; exits 0 on success, 2 on bad input, 130 or 143 when interrupted, 1 on anything unforeseen."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)  # noqa: T201, RUF100
        sys.exit(0 if arguments else EXIT_BAD_INPUT)
    if arguments[0] == "--version":
        print(__version__)  # noqa: T201, RUF100
        sys.exit(0)
    command, rest = arguments[0], arguments[1:]
    if "--help" in rest or "-h" in rest:
        print(HELP)  # noqa: T201, RUF100
        sys.exit(0)
    _interrupts.clear()
    _set_up_process()
    try:
        code = _run(command, rest)
    except AmiciEvalError as error:
        _complain(error)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt as interrupt:
        code = 143 if isinstance(interrupt, _TerminatedError) else 130
        sys.stderr.write("amici-eval: interrupted\n")
    sys.exit(code)


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


_interrupts: list[type[KeyboardInterrupt]] = []
"""Signals that came. Python drops what a handler raises while garbage is collected (JAX runs code there), so that long
work asks again."""


def _on_signal(signum: int, frame: object) -> None:  # noqa: ARG001, RUF100 - the signal module's signature
    _interrupts.append(KeyboardInterrupt if signum == signal.SIGINT else _TerminatedError)
    raise _interrupts[-1]


def _set_up_process() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # a closed terminal must not leave a run RUNNING either
        number = getattr(signal, name, None)
        # a job in the background of a shell ignores Ctrl-C, and so it stays
        if number is not None and (name != "SIGINT" or signal.getsignal(number) is not signal.SIG_IGN):
            signal.signal(number, _on_signal)
    # MLflow's default retries keep a user waiting for minutes when a server is gone
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("amici_eval").setLevel(logging.INFO)
    for chatty in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _complain(error: AmiciEvalError) -> None:
    sys.stderr.write(f"amici-eval: {error}\n")


def _run(command: str, rest: list[str]) -> int:
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
    return _run_hydra(command, rest)


_PROJECT_KEYS = {
    "data": "data.uri",
    "device": "ablation.device",
    "n_permutations": "permutation.n_permutations",
}
_SEED_KEY = {"evaluate": "permutation.seed", "demo": "seed"}


def project_overrides(arguments: list[str], command: str = "evaluate") -> list[str]:
    """Turn what MLflow Projects passes (``--key value``) into Hydra overrides.

    An empty value means the default; ``overrides`` is split at spaces as a shell would; names that are short for a
    setting are written out; anything else is passed on as ``key=value``.
    """
    import shlex

    overrides: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--"):
            overrides.append(argument)
            continue
        key = argument[2:]
        if "=" in key:
            key, _, value = key.partition("=")
        elif position < len(arguments):
            value = arguments[position]
            position += 1
        else:
            raise InvalidSpecError(value=f"parameter {argument}", rule="it needs a value", fix=f"pass -P {key}=VALUE")
        if value == "":
            continue
        if key == "overrides":
            overrides += shlex.split(value)
        elif key == "seed":
            overrides.append(f"{_SEED_KEY.get(command, 'seed')}={value}")
        else:
            overrides.append(f"{_PROJECT_KEYS.get(key, key)}={value}")
    return overrides


def _written_out(argument: str, command: str) -> str:
    """Write out the short names that ``mlflow run -P`` takes too, and let users add tags of their own."""
    key, equals, value = argument.partition("=")
    if command == "evaluate" and key in ("device", "n_permutations", "seed"):
        key = {**_PROJECT_KEYS, "seed": _SEED_KEY["evaluate"]}[key]
    if key.startswith("tracking.tags."):
        key = f"++{key}"
    return f"{key}{equals}{value}"


def config_directory() -> Path:
    """Return the folder of the configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _run_hydra(command: str, arguments: list[str]) -> int:
    import hydra

    from amici_eval.config import register_schemas
    from amici_eval.overrides import check_override, hydra_override

    own_configs = any(argument.startswith("--config-") or argument in ("-cd", "-cn", "-cp") for argument in arguments)
    sweep = "-m" in arguments or "--multirun" in arguments
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
        plain = argument.startswith(("~", "+", "hydra/", "hydra.")) or (
            "=" in argument and "/" in argument.split("=")[0]
        )
        overrides.append(argument if plain else hydra_override(_written_out(argument, command), sweep=sweep))
        if not plain and not own_configs and not overrides[-1].startswith("++"):
            check_override(command, overrides[-1], configs=config_directory(), sweep=sweep)
    register_schemas()
    codes, jobs = [0], []

    def task(config: DictConfig) -> None:
        jobs.append(command)
        try:
            _TASKS[command](config)
        except AmiciEvalError as error:
            if sweep:
                # Hydra notes which job failed and goes on with the others
                codes[0] = EXIT_BAD_INPUT
                _complain(error)
                raise
            _complain(error)
            codes[0] = EXIT_BAD_INPUT

    # Hydra writes multirun.yaml with the whole configuration into the folder of a sweep
    scratch = tempfile.TemporaryDirectory(prefix="amici-eval-sweep-")
    os.environ[SCRATCH_VARIABLE] = scratch.name
    before = sys.argv
    # flags first: Hydra's parser takes settings from one place only
    sys.argv = ["amici-eval", *flags, *overrides]
    try:
        hydra.main(config_path=str(config_directory()), config_name=command, version_base="1.3")(task)()
    except BaseException as end:
        if sweep:
            from amici_eval.tracking.sweep import close_parent

            close_parent("KILLED" if isinstance(end, KeyboardInterrupt) else "FAILED")
        # Hydra exits with 1 for settings that it refuses itself, before any job, and after jobs that failed
        if isinstance(end, SystemExit) and end.code == 1 and (not jobs or codes[0] == EXIT_BAD_INPUT):
            return EXIT_BAD_INPUT
        raise
    finally:
        sys.argv = before
        os.environ.pop(SCRATCH_VARIABLE, None)
        scratch.cleanup()
    return codes[0]


def _evaluate(config: DictConfig) -> None:
    from amici_eval.config import evaluation_spec, report_spec, resolved_yaml, tracking_spec

    spec, report, tracking = evaluation_spec(config), report_spec(config), tracking_spec(config)
    _set_up_process()
    from amici_eval.report.tables import summary_lines
    from amici_eval.tracking.jobs import evaluate_job

    with _reporter() as progress:
        result = evaluate_job(
            config.model_uri,
            data_uri=config.data.uri,
            spec=spec,
            report=report,
            tracking=tracking,
            config_yaml=resolved_yaml(config),
            progress=progress,
        )
    _say(f"{config.model_uri}:", *summary_lines(result.evaluation), "")
    shown = mask_secrets(result.tracking_uri)
    _say(f"run {result.run_id} in {shown}", *_how_to_look(shown))
    if result.folder is not None:
        _say(f"local copy in {result.folder}")


def _how_to_look(tracking_uri: str) -> tuple[str, ...]:
    if tracking_uri.startswith("http"):
        return (f"look at it in the browser: {tracking_uri}",)
    return (f"look at it with: mlflow ui --backend-store-uri {tracking_uri}",)


def _register(config: DictConfig) -> None:
    from amici_eval.config import tracking_spec

    tracking = tracking_spec(config)
    from amici_eval.tracking.jobs import register_job

    if config.register.trust:
        logger.warning("register.trust=true: unpickling %s runs whatever code the file holds", config.model_dir)
    version = register_job(
        config.model_dir,
        name=config.name,
        data_uri=config.data.uri,
        adata=config.register.adata,
        trust=config.register.trust,
        alias=config.register.alias,
        tracking=tracking,
    )
    _say(
        f"registered {version.uri} (logged model {version.model_id}, run {version.run_id})",
        f"evaluate it with: amici-eval evaluate model_uri={version.uri}"
        + (f" tracking.uri={mask_secrets(tracking.uri)}" if tracking.uri else ""),
    )


def _demo(config: DictConfig) -> None:
    from amici_eval.config import tracking_spec
    from amici_eval.demo import run_demo

    run_demo(
        seed=config.seed,
        output_dir=Path(config.output_dir),
        n_permutations=config.n_permutations,
        tracking=tracking_spec(config),
        say=_say,
    )


_TASKS: dict[str, Callable[[Any], None]] = {"evaluate": _evaluate, "register": _register, "demo": _demo}


def _upload(rest: list[str]) -> int:
    folders = [argument for argument in rest if not argument.startswith("-")]
    if len(folders) != 1:
        raise InvalidSpecError(
            value=f"upload with {len(folders)} folders", rule="it takes one folder", fix="amici-eval upload DIR"
        )
    from amici_eval.tracking.run_log import upload

    run_id = upload(Path(folders[0]))
    _say(f"run {run_id} is complete")
    return 0


def _say(*lines: str) -> None:
    for line in lines:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class _reporter:  # noqa: N801, RUF100 - used as a context manager function
    """Progress: a bar with rate and time left in a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        # time counts from the first report, so that loading is not taken for work
        self._first_done: int | None = None
        self._started = self._last = 0.0

    def __enter__(self) -> Callable[[int, int, str], None]:
        return self._report

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _report(self, done: int, total: int, what: str) -> None:
        if _interrupts:
            raise _interrupts[-1]
        if sys.stderr.isatty():
            self._show_bar(done, total, what)
            return
        now = time.monotonic()
        if self._first_done is None:
            self._first_done, self._started, self._last = done, now, now
        elif now - self._last >= _LOG_SECONDS and done > self._first_done:
            self._last = now
            left = (now - self._started) / (done - self._first_done) * (total - done)
            sys.stderr.write(f"{100 * done // total:3d} % ({what}), about {left:.0f} s left\n")
            sys.stderr.flush()

    def _show_bar(self, done: int, total: int, what: str) -> None:
        from tqdm import tqdm

        if self._bar is None or self._bar.total != total:
            if self._bar is not None:
                self._bar.close()
            self._bar = tqdm(total=total, unit_scale=True, unit="step", file=sys.stderr, dynamic_ncols=True)
        self._bar.set_description(what, refresh=False)
        self._bar.update(done - self._bar.n)
