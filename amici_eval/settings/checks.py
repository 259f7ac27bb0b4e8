"""Checks that settings share: each refuses a value with the rule it breaks and a value that would do."""

from __future__ import annotations

import difflib
import re

from amici_eval.common.errors import InvalidSpecError

_ALIAS = re.compile(r"(?!(latest|v\d+)\Z)[\w-]{1,255}", re.IGNORECASE)

_MEMORY = re.compile(r"(\d+(?:\.\d+)?) ?((?:[KMGT]i?)?B?)", re.IGNORECASE)
_UNITS = {
    f"{prefix}{binary}{unit}".upper(): base**power
    for power, prefix in enumerate(("", "K", "M", "G", "T"))
    for binary, base in (("", 1000), ("i", 1024))
    for unit in ("B", "")
    if prefix or not binary
}
_LEAST_MEMORY = 10**6


def require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among the allowed ones, and point to the nearest."""
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1)
        raise InvalidSpecError(
            value=f"{name}={value!r}",
            rule=f"it must be one of {', '.join(allowed)}",
            fix=f"set {name}={(close or allowed)[0]}",
        )


def require_int(name: str, value: object, minimum: int) -> None:
    """Refuse what is no whole number, or one that is too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidSpecError(
            value=f"{name}={value!r}",
            rule=f"it must be a whole number of at least {minimum}",
            fix=f"set {name}={minimum}",
        )


def bytes_of(name: str, text: str | int) -> int:
    """Return an amount of memory in bytes, and refuse what is none."""
    match = _MEMORY.fullmatch(str(text).strip())
    if match is None or isinstance(text, bool) or int(float(match[1]) * _UNITS[match[2].upper()]) < _LEAST_MEMORY:
        raise InvalidSpecError(
            value=f"{name}={text!r}",
            rule="it must be an amount of memory of at least 1MB",
            fix="write it as 500MB, 4GB or a number of bytes, or leave it out",
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def check_alias(setting: str, alias: str) -> None:
    """Refuse what MLflow takes for no alias of a model version."""
    if not _ALIAS.fullmatch(alias):
        raise InvalidSpecError(
            value=f"{setting}={alias!r}",
            rule="an alias has letters, digits, '_' and '-', at most 255; 'latest' and 'v<number>' are MLflow's own",
            fix="choose another",
        )
