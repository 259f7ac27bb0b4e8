"""The help of the command line: what the commands are, and what each of them may be told."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, is_dataclass
from typing import TYPE_CHECKING, Any

import yaml

from amici_eval.settings.commands import COMMANDS, sentence_of, settings_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from amici_eval.settings.commands import Setting

_USAGE = {
    "evaluate": "model_uri=models:/NAME/VERSION [data.uri=FILE]",
    "compare": "model=NAME versions=[1,2] [data.uri=FILE]",
    "gate": "model_uri=models:/NAME/VERSION [--dry-run]",
    "watch": "model=NAME [--once]",
    "rollback": "model=NAME [alias=champion] [--dry-run]",
    "register": "model_dir=DIR name=NAME data.uri=FILE",
    "demo": "",
    "upload": "DIR",
}
_OVERVIEW = """\
amici-eval: which attention heads of a trained AMICI model carry cell-cell communication signal, and how sure is that

usage: amici-eval COMMAND [key=value ...] [hydra flags]

commands
{commands}

settings of a command, with defaults and what they mean: amici-eval COMMAND --help

hydra flags
  -m, --multirun       run once per value: amici-eval evaluate -m model_uri=models:/a/1,models:/a/2
  --config-dir DIR     add a folder of your own configs
  --cfg job            print the configuration and stop

  --version, --help
"""
_WIDTH, _TEXT_FROM = 118, 46


def overview() -> str:
    """Return what ``amici-eval --help`` prints."""
    told = {command: sentence_of(spec) for command, spec in COMMANDS.items()}
    told["upload"] = "Finish a run whose tracking server failed half way."
    lines = []
    for command, sentence in told.items():
        first, *others = [one for one in (_USAGE[command], sentence) if one]
        lines += [f"  {command:<9} {first}", *(f"  {'':<9} {other}" for other in others)]
    return _OVERVIEW.format(commands="\n".join(lines))


def help_of(command: str, configs: Path) -> str:
    """Return the settings of a command with their defaults, which ready-made groups in ``configs`` may change."""
    spec, groups = COMMANDS[command], _defaults(configs, command)
    lines = [f"usage: amici-eval {' '.join([command, *_USAGE[command].split()])} [key=value ...] [hydra flags]", ""]
    lines += [sentence_of(spec), "", "settings"]
    for one in settings_of(spec):
        if is_dataclass(one.kind):
            lines += ["", f"{one.name}: {sentence_of(one.kind)}", *_of_group(one, one.name, groups.get(one.name, {}))]
        else:
            needed = "Must be given. " if one.default is MISSING else ""
            lines += _line(one.name, one.default, f"{needed}{one.meaning}")
    return "\n".join([*lines, "", f"as YAML: amici-eval {command} --cfg job; more: docs/settings.md"])


def _defaults(configs: Path, command: str) -> dict[str, dict[str, Any]]:
    """Return what the groups that a command takes by default hold."""

    def read(file: Path) -> dict[str, Any]:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}

    def held(group: str, option: str) -> dict[str, Any]:
        values = read(configs / group / f"{option}.yaml")
        further = [one for one in values.pop("defaults", ()) if one != "_self_"]
        return {name: value for one in further for name, value in held(group, one).items()} | values

    chosen = [one for one in read(configs / f"{command}.yaml")["defaults"] if isinstance(one, dict)]
    return {group: held(group, option) for one in chosen for group, option in one.items()}


def _of_group(group: Setting, path: str, defaults: Mapping[str, Any]) -> Iterator[str]:
    for one in settings_of(group.kind):
        name, value = f"{path}.{one.name}", defaults.get(one.name, one.default)
        if group.reads is not None and one.name not in group.reads:
            continue
        if is_dataclass(one.kind):
            head = f"{name}: {one.meaning or sentence_of(one.kind)}"
            yield from textwrap.wrap(head, _WIDTH, initial_indent="  ", subsequent_indent="    ")
            yield from _of_group(one, name, value if isinstance(value, Mapping) else {})
        elif isinstance(value, Mapping) and value:
            yield from _line(name, MISSING, f"{one.meaning} By default: {', '.join(value)}.")
        else:
            yield from _line(name, value, one.meaning)


def _line(name: str, default: Any, meaning: str) -> list[str]:
    head = f"  {name}" if default is MISSING else f"  {name}={_written(default)}"
    told = textwrap.wrap(meaning, _WIDTH - _TEXT_FROM, break_long_words=False, break_on_hyphens=False) or [""]
    first = [head] if len(head) + 2 > _TEXT_FROM else [(head.ljust(_TEXT_FROM) + told.pop(0)).rstrip()]
    return first + [" " * _TEXT_FROM + line for line in told]


def _written(value: Any) -> str:
    """Return a default as a user would type it."""
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def reference() -> str:
    """Return docs/settings.md: the settings of all commands, each group once."""
    groups: dict[str, tuple[Any, list[str]]] = {}
    lines = [_PREFACE]
    for command, spec in COMMANDS.items():
        lines += [f"## `amici-eval {' '.join([command, *_USAGE[command].split()])}`", "", sentence_of(spec), ""]
        own = [one for one in settings_of(spec) if not is_dataclass(one.kind)]
        lines += [*_table(_rows(own, "")), ""] if own else []
        taken = [one for one in settings_of(spec) if is_dataclass(one.kind)]
        for one in taken:
            part = "" if one.reads is None else f" ({', '.join(one.reads)} only)"
            groups.setdefault(one.name, (one.kind, []))[1].append(command + part)
        lines += [f"Groups: {', '.join(f'[`{one.name}`](#{one.name})' for one in taken)}.", ""]
    for name, (kind, commands) in groups.items():
        lines += [f"## {name}", "", f"{sentence_of(kind)} Of {', '.join(commands)}.", ""]
        lines += [*_table(_rows(settings_of(kind), f"{name}.")), ""]
    return "\n".join(lines)


def _rows(settings: list[Setting], group: str) -> Iterator[tuple[str, str, str]]:
    for one in settings:
        name, meaning = f"{group}{one.name}", one.meaning.replace("|", r"\|")
        if is_dataclass(one.kind):
            yield f"`{name}`", "", meaning or sentence_of(one.kind)
            yield from _rows(settings_of(one.kind), f"{name}.")
        else:
            yield f"`{name}`", "must be given" if one.default is MISSING else f"`{_written(one.default)}`", meaning


def _table(rows: Iterator[tuple[str, str, str]]) -> list[str]:
    return ["| setting | default | meaning |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]


_PREFACE = """\
# Settings

<!-- made by: python -m amici_eval.cli.help > docs/settings.md -->

A setting is given as `name=value` behind the command; `amici-eval COMMAND --help` shows those of a command, and
`amici-eval COMMAND --cfg job` what they are after yours. Lists are written `[a,b]`, no value is `null`.

Ready-made groups: `permutation=free` (default) or `permutation=reference` (p-values of amici-st), `ablation=factored`
(default) or `ablation=hooked`, `launch=local` (default) or `launch=ray`, `gate=default`, `gate=strict` or
`gate=better`; gate and watch take `compare=gate`, which leaves out tests gene by gene and untrained models.

Groups of your own: `amici-eval evaluate --config-dir my_configs permutation=strict` with
`my_configs/permutation/strict.yaml`, which names what differs.

Which null to take: [which-null.md](which-null.md); what the tests guarantee: [validity.md](validity.md); MLflow's
variables: [environment.md](environment.md).
"""

if __name__ == "__main__":
    print(reference())  # noqa: T201, RUF100
