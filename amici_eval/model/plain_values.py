"""Plain values for JSON of what scvi-tools records, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from amici_eval.common.errors import ModelFormatError
from amici_eval.model.allow_list import Inert

__all__ = ["history_of", "to_plain", "values_of", "with_arrays"]

_MOST_VALUES = 2_000_000
_DEEPEST = 64
_MOST_PARTS = 10_000


def to_plain(value: Any, where: str) -> Any:
    """Turn a registry into JSON values; arrays become ``{"array": [...], "dtype": ...}`` so that they come back."""
    return _plain(value, where, _ValueBudget(left=_MOST_VALUES), 0)


@dataclass
class _ValueBudget:
    left: int

    def take(self, n: int, where: str) -> None:
        self.left -= n
        if self.left < 0:
            raise ModelFormatError(
                value=f"{where} holds more than {_MOST_VALUES} values",
                rule="set-up must be small enough to be stored",
                fix="train the model with plain arguments",
            )


def _plain(value: Any, where: str, count: _ValueBudget, depth: int) -> Any:
    count.take(1, where)
    if depth > _DEEPEST:
        count.take(_MOST_VALUES + 1, f"{where[:80]}, nested more than {_DEEPEST} deep,")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}", count, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, count, depth + 1) for item in value]
    if isinstance(value, np.ndarray):
        count.take(value.size, where)
        return {
            "array": [_plain(item, where, count, depth + 1) for item in value.tolist()],
            "dtype": str(value.dtype),
        }
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ModelFormatError(
        value=f"{where} holds a {type(value).__name__}",
        rule="set-up must consist of plain values and arrays, so that it can be stored without pickle",
        fix="train the model with plain arguments",
    )


def with_arrays(value: Any) -> Any:
    """Undo :func:`to_plain`."""
    if isinstance(value, Mapping):
        if set(value) == {"array", "dtype"}:
            return np.array(value["array"], dtype=value["dtype"])
        return {key: with_arrays(item) for key, item in value.items()}
    return value


def values_of(stored: Any) -> list[Any]:
    """Return the values of an array, as stored or live."""
    return list(stored["array"]) if isinstance(stored, Mapping) else list(stored)


def history_of(history: Any) -> dict[str, tuple[float, ...]]:
    """Return training curves as plain numbers by name; a curve that cannot be read is left out."""
    curves = {}
    for name, table in history.items() if isinstance(history, Mapping) else ():
        values = _first_numbers(table) if isinstance(table, Inert) else np.asarray(table, dtype=np.float64)
        if values is not None:
            curves[str(name)] = tuple(map(float, values.ravel()))
    return curves


def _first_numbers(table: Inert) -> np.ndarray | None:
    """Return the first array of floating-point numbers, plain or as objects, that a table was made of."""
    waiting, looked_at = [table], 0
    while waiting and looked_at < _MOST_PARTS:
        one, looked_at = waiting.pop(), looked_at + 1
        if isinstance(one, np.ndarray) and one.size and all(isinstance(value, float) for value in one.ravel().tolist()):
            return one.astype(np.float64)
        if isinstance(one, Inert):
            waiting += one.parts[::-1]
        elif isinstance(one, (list, tuple)):
            waiting += one[::-1]
        elif isinstance(one, dict):
            waiting += list(one.values())[::-1]
    return None
