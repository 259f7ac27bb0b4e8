"""Unpickle the ``model.pt`` of an AMICI without running code that the file brings along."""

from __future__ import annotations

import codecs
import io
import pickle
import re
import types
import zipfile
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np
import torch

from amici_eval.errors import UnsafePickleError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["load_allow_listed"]

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
    "pandas._libs.internals": {"_unpickle_block"},
    "pandas.core.frame": {"DataFrame"},
    "pandas.core.series": {"Series"},
    "pandas.core.indexes.base": {"Index", "_new_Index"},
    "pandas.core.indexes.range": {"RangeIndex"},
    "pandas.core.internals.managers": {"BlockManager", "SingleBlockManager"},
    # torch.load resolves names such as FloatStorage before it asks here
    "torch": {"Size", "device"},
    "torch.storage": {"TypedStorage", "UntypedStorage"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_parameter"},
}


def load_allow_listed(path: Path) -> Any:
    """Return what ``torch.save`` wrote, if it consists of arrays, tables and plain containers.

    Parameters
    ----------
    path
        A zip archive of ``torch.save``.

    Raises
    ------
    UnsafePickleError
        If the pickle asks for anything outside the allow-list, or the archive holds a TorchScript program.
    KeyError, zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError
        If the archive is damaged or was written by something else.

    Notes
    -----
    ``torch.load`` runs TorchScript, which can write files, when it finds a program in the archive, and reads older
    formats by other rules. It is therefore handed a new archive with the records of plain ``torch.save`` alone.
    """
    records = _plain_records(path)
    return torch.load(records, map_location="cpu", weights_only=False, pickle_module=_ALLOW_LIST_PICKLE)


def _plain_records(path: Path) -> io.BytesIO:
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
                target.writestr(name, source.read(name))
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
    """Return the bytes that protocol 2 writes as text; other codecs have no place in a model."""
    if encoding != "latin1":
        _refuse(f"_codecs.encode(..., {encoding!r})")
    return codecs.encode(text, "latin1")


_STAND_INS = {("numpy", "dtype"): _plain_dtype, ("_codecs", "encode"): _latin1}


def _refuse(what: str) -> NoReturn:
    raise UnsafePickleError(
        value=f"the pickle asks for {what}",
        rule="a model.pt of AMICI needs arrays, tables and plain containers only",
        fix=_TRUST,
    )


class _AllowListUnpickler(pickle._Unpickler):  # the Python one: its BUILD can be watched
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        # BUILD on a class or function would set its attributes for the whole process
        target = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(target, (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)):
            _refuse(f"a change of {getattr(target, '__name__', target)!r} itself")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        # protocol 2 writes Python 2's names
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module_name, module_name)
        if global_name not in _ALLOWED_GLOBALS.get(module, ()):
            _refuse(f"{module_name}.{global_name}")
        return _STAND_INS.get((module, global_name)) or super().find_class(module, global_name)


# torch.load takes a module that looks like pickle
_ALLOW_LIST_PICKLE: Any = types.SimpleNamespace(
    Unpickler=_AllowListUnpickler,
    load=lambda file, **options: _AllowListUnpickler(file, **options).load(),
    __name__="amici_eval_allow_list_pickle",
)
