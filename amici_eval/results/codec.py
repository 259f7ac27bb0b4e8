"""Results as plain values for JSON, and back: one way for all of them, which follows from the types of their fields."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from amici_eval.common.errors import DataError
from amici_eval.common.files import parse_json, read_plain_file
from amici_eval.settings.evaluation import EvaluationSpec, spec_from_mapping

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

_MOST_BYTES = 2**32
_MOST_VALUES = 10**8
_MOST = 2**63
MOST_HEADS = 2**16
# annotations are kept as text with single quotes
_ARRAY = re.compile(r"(Float64|Float32|Int64)\[np\.ndarray, '([^']*)'\]")
_PLAIN = {"bool": bool, "str": str, "int": int}
_Read = TypeVar("_Read")
_Result = TypeVar("_Result", bound="Record")


class Record:
    """A frozen dataclass that a run keeps as JSON.

    The annotation of a field says how it is read: ``Float64[np.ndarray, "heads types"]`` is an array of that kind, with
    a dimension for each word.
    """

    sized_by: ClassVar[Mapping[str, str | int]] = {}
    """Dimensions whose size the record itself decides: by a number, the length of a field, or a field that is one."""
    apart: ClassVar[tuple[str, ...]] = ()
    """Fields that are not part of the record, for they are kept elsewhere."""
    may_be_undefined: ClassVar[tuple[str, ...]] = ()
    """Single numbers that are NaN where they are not defined."""

    @classmethod
    def sizes_in(cls, values: Mapping[str, Any]) -> dict[str, int]:
        """Return the sizes of dimensions that fields, or their plain values, decide."""
        sources = {name: values[source] if isinstance(source, str) else source for name, source in cls.sized_by.items()}
        return {name: source if isinstance(source, int) else len(source) for name, source in sources.items()}

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise ``ValueError`` if an array has another shape than its own sizes and these ask for."""
        sizes = {**sizes, **self.sizes_in(vars(self))}
        for name, dimensions in arrays_of(type(self)).items():
            value, expected = getattr(self, name), tuple(sizes.get(dimension) for dimension in dimensions)
            shape = np.shape(value)
            fits = len(shape) == len(expected) and all(
                size in (n, None) for n, size in zip(shape, expected, strict=True)
            )
            if value is not None and not fits:
                msg = f"{type(self).__name__}.{name} has shape {shape}, not {expected}"
                raise ValueError(msg)

    def to_record(self) -> dict[str, Any]:
        """Return plain values for JSON; numbers that are not finite become ``None``."""
        return {
            entry.name: plain(getattr(self, entry.name))
            for entry in fields(self)  # type: ignore[arg-type]
            if entry.name not in self.apart
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], sizes: Mapping[str, int]) -> Self:
        """Read what :meth:`to_record` gave."""
        kinds = {entry.name: str(entry.type) for entry in fields(cls)}  # type: ignore[arg-type]
        for name in ("n_heads", *(name for name, kind in kinds.items() if kind == "int")):
            value = record.get(name, 0)
            if type(value) is not int or not 0 <= value < (MOST_HEADS if name == "n_heads" else _MOST):
                msg = f"{cls.__name__}.{name} is no number that it may be"
                raise ValueError(msg)
        if lacking := [name for name in kinds if name not in record and name not in cls.apart]:
            msg = f"{cls.__name__} lacks {', '.join(lacking)}"
            raise ValueError(msg)
        for name in cls.apart:
            if record.get(name) is not None:
                msg = f"{cls.__name__}.{name} is kept elsewhere"
                raise ValueError(msg)
        sizes = {**sizes, **cls.sizes_in(record)}
        return cls(**{name: _read(cls, name, kinds[name], value, sizes) for name, value in record.items()})


def arrays_of(cls: Any) -> dict[str, tuple[str, ...]]:
    """Return the names of the dimensions of each array of a record."""
    found = {entry.name: _ARRAY.match(str(entry.type)) for entry in fields(cls)}
    return {name: tuple(array[2].split()) for name, array in found.items() if array}


def plain(value: Any) -> Any:
    """Return a value as JSON holds it; numbers that are not finite become ``None``."""
    if isinstance(value, Record):
        return value.to_record()
    if isinstance(value, EvaluationSpec):
        return value.to_dict()
    if isinstance(value, np.ndarray):
        if np.issubdtype(value.dtype, np.floating):
            value = np.where(np.isfinite(value), value, None)  # type: ignore[call-overload]
        return value.tolist()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    return value


def _read(cls: type[Record], name: str, kind: str, value: Any, sizes: Mapping[str, int]) -> Any:
    """Return a field of the type that its annotation names from its plain value, or refuse a value of another type."""
    if value is None and kind.endswith("| None"):
        return None
    kind = kind.removesuffix(" | None")
    if array := _ARRAY.fullmatch(kind):
        shape = [sizes.get(dimension, -1) for dimension in array[2].split()]
        return np.array(value, dtype=array[1].lower()).reshape(shape)
    if kind == "EvaluationSpec":
        return spec_from_mapping(value)
    if kind == "float" and value is None and name in cls.may_be_undefined:
        return math.nan
    if kind.startswith("tuple[") and isinstance(value, list):
        inner = kind.removeprefix("tuple[").removesuffix("]")
        several = inner.endswith(", ...")
        kinds = [inner.removesuffix(", ...")] * len(value) if several else inner.split(", ")
        return tuple(_read(cls, name, one, item, sizes) for one, item in zip(kinds, value, strict=True))
    fits = (
        isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind == "float"
        else isinstance(value, dict)
        if kind.startswith("Mapping[")
        else type(value) is _PLAIN.get(kind)
    )
    if fits:
        return value
    if kind in _PLAIN or kind == "float" or "[" in kind:
        msg = f"{cls.__name__}.{name} is no {kind}"
        raise ValueError(msg)
    # a record within a record
    return getattr(sys.modules[cls.__module__], kind).from_record(value, sizes)


def read_result(cls: type[_Result], text: str | bytes, *, what: str, file_name: str, newest: int, redo: str) -> _Result:
    """Return what a file of a run holds; ``what`` it is, with its article, and what to ``redo`` are for messages."""
    noun = what.partition(" ")[2]
    try:
        record = dict(parse_json(text, max_values=_MOST_VALUES))
        version = record["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            value=f"not {what} ({error})", rule=f"it must be the {file_name} of a run", fix="download it again"
        ) from error
    check_schema_version(version, what=noun, newest=newest)
    try:
        return cls.from_record(record, {})
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError, MemoryError) as error:
        raise DataError(
            value=f"damaged {noun} ({type(error).__name__}: {error})",
            rule="all fields of its schema version must be there, with matching sizes",
            fix=f"download it again or {redo}",
        ) from error


def check_schema_version(version: Any, *, what: str, newest: int) -> None:
    """Refuse a schema version that this version of the package does not read."""
    if type(version) is not int or not 1 <= version <= newest:
        raise DataError(
            value=f"{what} of schema version {version!a:.80}",
            rule=f"this version of amici_eval reads schema versions 1 to {newest}",
            fix="install the version of amici_eval that wrote it",
        )


def load_result(directory: str | Path, file_name: str, from_json: Callable[[bytes], _Read]) -> _Read:
    """Return what a JSON file in a folder holds; a message names the file."""
    path = Path(directory) / file_name
    if not path.is_file():
        raise DataError(
            value=f"{directory} holds no {file_name}",
            rule="load() takes a folder that save() or a run wrote",
            fix="give the folder itself",
        )
    try:
        # not read_text: from_json reports bytes that are not UTF-8 as damage
        return from_json(read_plain_file(path, limit=_MOST_BYTES, links=True))
    except DataError as error:
        raise DataError(value=f"{path}: {error.value}", rule=error.rule, fix=error.fix) from error
    except (OSError, ValueError) as error:
        raise DataError(
            value=f"{path} cannot be read ({error})",
            rule="it must be a plain file of a run",
            fix="download it again",
        ) from error


def save_result(directory: str | Path, file_name: str, text: str) -> Path:
    """Write a JSON file into a folder (made if missing) and return it."""
    path = Path(directory) / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
