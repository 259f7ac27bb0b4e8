"""Results with arrays of matching shapes, as plain values for JSON and back."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from amici_eval.common.errors import DataError
from amici_eval.common.untrusted import read_plain_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_MOST_BYTES = 2**32
_Read = TypeVar("_Read")


class NamedArrays:
    """A record with arrays of named shapes, one letter a dimension: H heads, C cell types, G genes and so on."""

    shapes: ClassVar[Mapping[str, str]]
    whole_numbers: ClassVar[frozenset[str]] = frozenset()
    """Arrays of whole numbers, besides those whose name begins with ``n_``."""
    apart: ClassVar[tuple[str, ...]] = ()
    """Fields that are not part of the record, for they are kept elsewhere."""

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise ``ValueError`` if an array has another shape than these sizes ask for."""
        for name, dimensions in self.shapes.items():
            expected = tuple(sizes[letter] for letter in dimensions)
            if getattr(self, name).shape != expected:
                msg = f"{type(self).__name__}.{name} has shape {getattr(self, name).shape}, not {expected}"
                raise ValueError(msg)

    @property
    def own_sizes(self) -> dict[str, int]:
        """Sizes that the record itself decides."""
        return {}

    def to_record(self) -> dict[str, Any]:
        """Return plain values for JSON; numbers that are not finite become ``None``."""
        record: dict[str, Any] = {}
        for entry in fields(self):  # type: ignore[arg-type]
            if entry.name in self.apart:
                continue
            value = getattr(self, entry.name)
            if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
                value = np.where(np.isfinite(value), value, None).tolist()  # type: ignore[call-overload]
            elif isinstance(value, np.ndarray):
                value = value.tolist()
            elif isinstance(value, tuple):
                value = list(value)
            record[entry.name] = value
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
        """Read what :meth:`to_record` gave."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
        cls._check_plain(values)
        own = {**sizes, **cls.sizes_in(values)}
        for name, dimensions in cls.shapes.items():
            kind = np.int64 if name.startswith("n_") or name in cls.whole_numbers else np.float64
            values[name] = np.array(record[name], dtype=kind).reshape(tuple(own[letter] for letter in dimensions))
        made = cls(**values)
        made.check(own)
        return made

    @classmethod
    def _check_plain(cls, values: Mapping[str, Any]) -> None:
        """Refuse entries, other than arrays, that are not of the field's type, as far as that can be checked."""
        for entry in fields(cls):  # type: ignore[arg-type]
            if entry.name in cls.shapes or entry.name not in values:
                continue
            kind, value = str(entry.type), values[entry.name]
            if value is None and kind.endswith("| None"):
                continue
            if entry.name in cls.apart:
                msg = f"{cls.__name__}.{entry.name} is kept elsewhere"
                raise ValueError(msg)
            if not _is_of(kind.removesuffix(" | None"), value):
                msg = f"{cls.__name__}.{entry.name} is no {kind}"
                raise ValueError(msg)

    @classmethod
    def sizes_in(cls, values: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes that plain values decide."""
        del values
        return {}


_MOST = 2**31


def _is_of(kind: str, value: Any) -> bool:
    """Return whether a plain value is of the kind that an annotation names; of unknown kinds, whether it is a tuple."""
    if kind == "int":
        return type(value) is int and -_MOST < value < _MOST
    if kind == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in ("bool", "str"):
        return type(value) is {"bool": bool, "str": str}[kind]
    if kind == "tuple[str, ...]":
        return isinstance(value, tuple) and all(isinstance(one, str) for one in value)
    if kind == "tuple[bool | None, ...]":
        return isinstance(value, tuple) and all(one is None or isinstance(one, bool) for one in value)
    if kind.startswith("Mapping["):
        return isinstance(value, dict)
    return isinstance(value, tuple)


def read_named(path: Path, from_json: Callable[[bytes], _Read]) -> _Read:
    """Return what a JSON file holds; a message names the file."""
    try:
        return from_json(read_plain_file(path, limit=_MOST_BYTES, links=True))
    except DataError as error:
        raise DataError(value=f"{path}: {error.value}", rule=error.rule, fix=error.fix) from error
    except (OSError, ValueError) as error:
        raise DataError(
            value=f"{path} cannot be read ({error})",
            rule="it must be a plain file of a run",
            fix="download it again",
        ) from error
