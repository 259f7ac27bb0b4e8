"""Overrides as typed: checked against the settings there are, and written as Hydra reads them."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from amici_eval.config import SCHEMAS
from amici_eval.errors import InvalidSpecError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_override", "hydra_override"]

_TEXT_KEYS = re.compile(
    r"(model_uri|baseline|model_dir|name|alias|gate\.promote|output_dir|ablation\.(device|memory_budget)|report\.palette"
    r"|data\.(uri|labels_key|coord_obsm_key|layer|sample_key|subset\.(key|value))"
    r"|launch\.address|register\.(adata|alias)|tracking\.(uri|experiment|run_name|output_dir)|\+\+tracking\.tags\..+)"
)


_ONE_MODEL = ("watch", "rollback")
"""Commands whose ``model`` is one name."""

_LIST_KEYS = (
    "model",
    "versions",
    "runs",
    "datasets",
    "ablation.modes",
    "permutation.tile_widths",
    "report.formats",
    "report.cell_types",
    "data.subset.indices",
)


def check_override(command: str, text: str, *, configs: Path | None, sweep: bool = False) -> None:
    """Refuse a setting that does not exist or takes no such value, before Hydra does in words of its own.

    Parameters
    ----------
    command
        Whose settings.
    text
        ``key=value``, as Hydra reads it.
    configs
        Folder of the groups' options; ``None``: options may lie elsewhere, too.
    sweep
        Whether a comma separates the values of a sweep.

    Raises
    ------
    InvalidSpecError
        With the names nearest to what was typed.
    """
    key, _, value = text.partition("=")
    schema, path = SCHEMAS[command], key.split(".")
    for depth, name in enumerate(path):
        if not is_dataclass(schema):  # below tags, or a setting that has no parts
            break
        known = [entry.name for entry in fields(schema)]
        if name not in known:
            group = ".".join(path[:depth])
            near = get_close_matches(name, known, n=3, cutoff=0.5)
            raise InvalidSpecError(
                value=f"setting {key!r}",
                rule=f"{group or command} has {', '.join(known)}",
                fix=f"write {' or '.join('.'.join([*path[:depth], one, *path[depth + 1 :]]) for one in near)}"
                if near
                else f"choose one of these; amici-eval {command} --cfg job shows all settings",
            )
        schema = get_type_hints(schema)[name]
    if is_dataclass(schema):
        names = [entry.name for entry in fields(schema)]
        options = None if configs is None else sorted(file.stem for file in (configs / path[0]).glob("*.yaml"))
        for option in value.split(",") if sweep else [value]:
            if len(path) == 1 and options is not None and option.strip("'\"") not in options:
                raise InvalidSpecError(
                    value=f"{key}={option}",
                    rule=f"{key} is a group of settings, ready-made as {', '.join(options) or 'none'}",
                    fix=f"choose one of these, or set what it holds one by one, as {key}.{names[0]}=...: "
                    f"{', '.join(names)}",
                )
        return
    if sweep:
        return
    try:
        parsed = OverridesParser.create().parse_override(text).value()
        OmegaConf.update(OmegaConf.structured(SCHEMAS[command]), key, parsed)
    except OmegaConfBaseException as error:
        raise InvalidSpecError(
            value=text,
            rule=str(error.msg or error).splitlines()[0],
            fix=f"amici-eval {command} --cfg job shows all settings with their defaults",
        ) from error
    except HydraException:
        return


def hydra_override(text: str, *, sweep: bool = False, command: str | None = None) -> str:
    """Return an override that Hydra reads as the user meant it.

    Parameters
    ----------
    text
        ``key=value`` as typed.
    sweep
        Whether a comma separates the values of a sweep.
    command
        Whose settings: ``model`` is one name for some, a list for others.

    Returns
    -------
    str
        The same, with the value quoted where Hydra's grammar would refuse it (``data.subset.value=A_&_B``) or read text
        as a number (``data.subset.value=007``).

    Raises
    ------
    InvalidSpecError
        If it is no override at all.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InvalidSpecError(
            value=f"argument {text!r}", rule="settings are written key=value", fix="see amici-eval --help"
        )
    one_model = key == "model" and command in _ONE_MODEL
    if key in _LIST_KEYS and not one_model and not sweep and value not in ("", "null") and value[0] not in "[$":
        return hydra_override(f"{key}=[{value}]")
    quoted = f"{key}='{_escape(value)}'"
    is_text = (one_model or _TEXT_KEYS.fullmatch(key)) and value not in ("", "null") and value[0] not in "'\"[{$"
    if is_text and not (sweep and "," in value):
        return quoted
    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        if value.startswith("[") and value.endswith("]"):
            return f"{key}=[{_quote_each(value[1:-1])}]"
        return f"{key}={_quote_each(value)}" if sweep and "," in value else quoted
    return text


def _quote_each(values: str) -> str:
    return ",".join(f"'{_escape(value.strip())}'" for value in values.split(","))


def _escape(value: str) -> str:
    # a backslash is special to Hydra only before a quote or at the end
    value = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", value)
    return re.sub(r"(\\+)$", lambda match: match[1] * 2, value)
