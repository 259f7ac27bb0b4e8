"""Results with arrays that must fit each other, as plain values for JSON and back."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["NamedArrays"]


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
        """Read what :meth:`to_record` gave.

        Raises
        ------
        KeyError, TypeError, ValueError
            If a field is missing, unknown, or of another size or kind.
        """
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
        own = {**sizes, **cls.sizes_in(values)}
        for name, dimensions in cls.shapes.items():
            kind = np.int64 if name.startswith("n_") or name in cls.whole_numbers else np.float64
            values[name] = np.array(record[name], dtype=kind).reshape(tuple(own[letter] for letter in dimensions))
        made = cls(**values)
        made.check(own)
        return made

    @classmethod
    def sizes_in(cls, values: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes that plain values decide."""
        del values
        return {}
