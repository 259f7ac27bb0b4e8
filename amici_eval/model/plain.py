"""Plain values for JSON of what scvi-tools records, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from amici_eval.errors import ModelFormatError

__all__ = ["history_of", "to_plain", "values_of", "with_arrays"]


def to_plain(value: Any, where: str) -> Any:
    """Turn a registry into JSON values; arrays become ``{"array": [...], "dtype": ...}`` so that they come back."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item, where) for item in value]
    if isinstance(value, np.ndarray):
        return {"array": [to_plain(item, where) for item in value.tolist()], "dtype": str(value.dtype)}
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
    """Return training curves as plain numbers by name."""
    if not isinstance(history, Mapping):
        return {}
    return {
        str(name): tuple(float(value) for value in np.asarray(frame, dtype=np.float64).ravel())
        for name, frame in history.items()
    }
