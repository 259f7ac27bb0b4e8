"""Unpickle the ``model.pt`` of an AMICI without running code from the file."""

from __future__ import annotations

import codecs
import io
import math
import pickle
import re
import types
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np
import torch

from amici_eval.common.errors import ModelFormatError, UnsafePickleError
from amici_eval.common.untrusted import check_is_plain_file

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Inert", "check_archive", "history_of", "load_allow_listed", "to_plain", "values_of", "with_arrays"]

_MOST_MADE = 10**7
_SMALL_BYTES = 2**26
_LARGEST_RATIO = 4

_TRUST = "if you trust whoever wrote the file with running code on this machine, pass register.trust=true"
_RECORD = re.compile(r"(?P<root>[^/]+)/(?P<name>data\.pkl|version|byteorder|data/\d+)")
_PLAIN_DTYPE = re.compile(r"O8?|[biufc]\d{1,2}")

_ALLOWED_GLOBALS = {
    "_codecs": {"encode"},
    "builtins": {
        "bytes",
        "bytearray",
        "complex",
        "dict",
        "float",
        "frozenset",
        "int",
        "list",
        "range",
        "set",
        "slice",
        "str",
        "tuple",
    },
    "collections": {"OrderedDict", "defaultdict"},
    "numpy": {"dtype", "ndarray"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    # torch.load resolves names such as FloatStorage itself
    "torch": {"Size", "device"},
    "torch.storage": {"TypedStorage", "UntypedStorage"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_parameter"},
}


# packages of the training curves' tables, whose pickles differ between versions
_INERT_PACKAGES = {"pandas", "pyarrow"}


def load_allow_listed(path: Path) -> Any:
    """Return what ``torch.save`` wrote, if it is arrays and plain containers; tables become :class:`Inert`.

    ``torch.load`` runs TorchScript, which can write files, when it finds a program in the archive, and reads older
    formats by other rules. It is therefore given a new archive with the records of plain ``torch.save`` alone.
    """
    sizes: dict[str, int] = {}
    records = _plain_records(path, sizes)
    # torch trusts the size of a record in the pickle, so this class checks it
    own = type("_OwnUnpickler", (_AllowListUnpickler,), {"record_sizes": sizes})
    # torch.load needs a module with the interface of pickle
    module: Any = types.SimpleNamespace(
        Unpickler=own,
        load=lambda file, **options: own(file, **options).load(),
        __name__="amici_eval_allow_list_pickle",
    )
    return torch.load(records, map_location="cpu", weights_only=False, pickle_module=module)


def check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to far more than its size, because ``torch.save`` does not compress."""
    size = check_is_plain_file(path, links=True)
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > max(_SMALL_BYTES, _LARGEST_RATIO * size):
        msg = f"it unpacks from {size} to {unpacked} bytes, and torch.save packs nothing"
        raise ValueError(msg)


def _plain_records(path: Path, sizes: dict[str, int]) -> io.BytesIO:
    """Return an archive of the plain records, and fill in their sizes by key."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as target:
        names = sorted(set(source.namelist()))
        roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            message = f"{len(roots)} records are named data.pkl; there must be one"
            raise KeyError(message)
        if any(name == f"{roots[0]}/constants.pkl" or name.startswith(f"{roots[0]}/code/") for name in names):
            raise UnsafePickleError(
                value=f"{path} is a TorchScript archive",
                rule="a model.pt of AMICI holds arrays, tables and plain containers, no program",
                fix=_TRUST,
            )
        for name in names:
            record = _RECORD.fullmatch(name)
            if record and record["root"] == roots[0]:
                content = source.read(name)
                sizes[record["name"].removeprefix("data/")] = len(content)
                target.writestr(name, content)
    copy.seek(0)
    return copy


def _plain_dtype(code: str, *options: Any) -> np.dtype[Any]:  # noqa: ARG001, RUF100 - numpy's pickles pass align and copy
    """Return NumPy's own instance of a dtype, on which the ``__setstate__`` that a pickle calls has no effect.

    A copy would take flags from the pickle, and an object array could then be filled with raw addresses.
    """
    if not _PLAIN_DTYPE.fullmatch(code):
        _refuse(f"numpy.dtype({code!r})")
    return np.dtype(code)


def _latin1(text: str, encoding: str) -> bytes:
    """Return the bytes that protocol 2 writes as text; refuse other codecs, which no model needs."""
    if encoding != "latin1":
        _refuse(f"_codecs.encode(..., {encoding!r})")
    return codecs.encode(text, "latin1")


_STAND_INS = {("numpy", "dtype"): _plain_dtype, ("_codecs", "encode"): _latin1}


class Inert:
    """Stands for an object of a table package: keeps the parts that it was built from, without any behaviour."""

    def __init__(self, *arguments: Any) -> None:
        self.parts: list[Any] = list(arguments)

    def __setstate__(self, state: Any) -> None:
        self.parts = [*getattr(self, "parts", ()), state]


def _refuse(what: str) -> NoReturn:
    raise UnsafePickleError(
        value=f"the pickle asks for {what}",
        rule="a model.pt of AMICI needs arrays, tables and plain containers only",
        fix=_TRUST,
    )


def _makes_much_of_little(function: Any, arguments: Any) -> bool:
    waiting, looked_at = [arguments], 0
    while waiting and looked_at < 1000:
        one = waiting.pop()
        looked_at += 1
        if isinstance(one, range):
            # not len(), which fails for larger ranges
            if one and abs(one[-1] - one[0]) // abs(one.step) > _MOST_MADE:
                return True
        elif isinstance(one, (tuple, list)):
            waiting += one[:1000]
        elif isinstance(one, dict):
            waiting += list(one.values())[:1000]
    if function in (bytes, bytearray) and isinstance(arguments, tuple):
        return any(isinstance(one, int) and one > _MOST_MADE for one in arguments)
    if function is np.ndarray and isinstance(arguments, tuple) and arguments:
        shape = arguments[0] if isinstance(arguments[0], tuple) else (arguments[0],)
        return math.prod(one for one in shape if isinstance(one, int)) > _MOST_MADE
    return False


class _AllowListUnpickler(pickle._Unpickler):  # the Python one: its BUILD can be watched
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        # BUILD on a class or function would set its attributes for the whole process
        target = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(target, (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)):
            _refuse(f"a change of {getattr(target, '__name__', target)!r} itself")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build

    record_sizes: ClassVar[dict[str, int]] = {}

    def load_reduce(self) -> None:
        # a few bytes must not create billions of values
        function, arguments = self.stack[-2], self.stack[-1]  # type: ignore[attr-defined]
        if _makes_much_of_little(function, arguments):
            _refuse(f"{getattr(function, '__name__', function)} of more than {_MOST_MADE} values out of none")
        super().load_reduce()  # type: ignore[misc]

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_binpersid(self) -> None:
        self._check_storage(self.stack[-1])  # type: ignore[attr-defined]
        super().load_binpersid()  # type: ignore[misc]

    dispatch[pickle.BINPERSID[0]] = load_binpersid

    def _check_storage(self, reference: Any) -> None:
        """Refuse a reference to more values than the record holds, because torch would read past its end."""
        if not isinstance(reference, tuple) or len(reference) != 5 or not isinstance(reference[2], str):
            return  # torch refuses it
        _, storage, key, _, n_values = reference
        dtype = getattr(storage, "dtype", torch.uint8)
        width = dtype.itemsize if isinstance(dtype, torch.dtype) else 1
        if type(n_values) is not int or not 0 <= n_values * width <= self.record_sizes.get(key, 0):
            held = self.record_sizes.get(key, 0)
            msg = f"record {key[:80]!a} has {held} bytes, and {n_values!a:.80} values are asked for"
            raise pickle.UnpicklingError(msg)

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        # protocol 2 writes the module names of Python 2
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module_name, module_name)
        if module.partition(".")[0] in _INERT_PACKAGES:
            return Inert
        if global_name not in _ALLOWED_GLOBALS.get(module, ()):
            _refuse(f"{module_name}.{global_name}")
        return _STAND_INS.get((module, global_name)) or super().find_class(module, global_name)


_MOST_VALUES = 2_000_000
_DEEPEST = 64
_MOST_PARTS = 10_000


def to_plain(value: Any, where: str) -> Any:
    """Return a registry as JSON values, with arrays as ``{"array": [...], "dtype": ...}`` for the way back."""
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
    """Return training curves as plain numbers by name, without those that cannot be read."""
    curves = {}
    for name, table in history.items() if isinstance(history, Mapping) else ():
        values = _first_numbers(table) if isinstance(table, Inert) else np.asarray(table, dtype=np.float64)
        if values is not None:
            curves[str(name)] = tuple(map(float, values.ravel()))
    return curves


def _first_numbers(table: Inert) -> np.ndarray | None:
    """Return the first array of floating-point numbers, plain or as objects, among the parts of a table."""
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
