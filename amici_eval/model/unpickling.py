"""Unpickle the ``model.pt`` that ``AMICI.save`` wrote, without running code from the file."""

from __future__ import annotations

import codecs
import io
import math
import os
import pickle
import re
import types
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np
import torch

from amici_eval.common.errors import ModelFormatError, UnsafePickleError, first_line
from amici_eval.common.files import check_is_plain_file

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


_MODEL, _ADATA = "model.pt", "adata.h5ad"
_ALLOW_PICKLE = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"
_MOST_MADE = 10**7
_SMALL_BYTES = 2**26
_LARGEST_RATIO = 4
_TRUST = "if you trust whoever wrote the file with running code on this machine, pass register.trust=true"
_RECORD = re.compile(r"(?P<root>[^/]+)/(?P<name>data\.pkl|version|byteorder|data/\d+)")
_PLAIN_DTYPE = re.compile(r"O8?|[biufc]\d{1,2}")
_ALLOWED_GLOBALS = {
    "_codecs": {"encode"},
    "builtins": set("bytes bytearray complex dict float frozenset int list range set slice str tuple".split()),
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
_MOST_PARTS = 10_000


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SavedAMICI:
    """The content of a ``model.pt``, or the same of a live model.

    ``attributes`` are the model's by name: ``init_params_``, ``registry_``, ``history_``, rows of the splits;
    ``weights`` is the module's state dict, on the CPU.
    """

    attributes: Mapping[str, Any]
    weights: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class SavedFiles:
    """The files that ``AMICI.save`` wrote: the model, and the AnnData if ``save_anndata=True``."""

    model: Path
    adata: Path | None


def saved_files(where: Path) -> SavedFiles:
    """Return the files of a saved model, given its folder or its ``model.pt``, whatever prefix they have."""
    found = [where] if where.is_file() else sorted(where.glob(f"*{_MODEL}"))
    if (where / _MODEL) in found:
        found = [where / _MODEL]
    if len(found) != 1:
        names = ", ".join(path.name for path in found)
        raise ModelFormatError(
            value=f"{where} holds {'several models: ' + names if found else 'no model.pt'}",
            rule="model_dir must be a folder that AMICI.save(...) wrote, or the path of its model.pt",
            fix=f"name one of them: model_dir={found[0]}" if found else "correct model_dir",
        )
    adata = found[0].with_name(found[0].name.removesuffix(_MODEL) + _ADATA)
    return SavedFiles(model=found[0], adata=adata if adata.is_file() else None)


def read_saved_amici(path: Path, *, trust: bool) -> SavedAMICI:
    """Return the content of a ``model.pt``; this unpickles it."""
    _check_pickles_are_allowed(path)
    if not path.is_file():
        raise ModelFormatError(
            value=f"{path.parent} {'holds no model.pt' if path.parent.is_dir() else 'does not exist'}",
            rule=f"{path.name} must be a plain file",
            fix="correct model_dir",
        )
    if not zipfile.is_zipfile(path):
        raise ModelFormatError(
            value=f"{path} is no torch archive",
            rule="it must be written by AMICI.save(...)",
            fix="copy or save it again",
        )
    try:
        check_archive(path)
        if trust:
            content = torch.load(path, map_location="cpu", weights_only=False)
        else:
            content = load_allow_listed(path)
        attributes, weights = content["attr_dict"], content["model_state_dict"]
        init_params = attributes["init_params_"]["kwargs"]
        if not isinstance(init_params, Mapping) or not isinstance(weights, Mapping):
            msg = "its parts are no mappings"
            raise TypeError(msg)
        _check_tensors(weights, path.stat().st_size)
    except UnsafePickleError as error:
        value = error.value if str(path) in error.value else f"{path}: {error.value}"
        raise UnsafePickleError(value=value, rule=error.rule, fix=error.fix) from error
    except Exception as error:
        raise ModelFormatError(
            value=f"{path} cannot be read ({first_line(error)})",
            rule="it must be what AMICI.save(...) wrote",
            fix="copy or save it again",
        ) from error
    return SavedAMICI(attributes=attributes, weights=weights)


def _check_pickles_are_allowed(path: Path) -> None:
    """Refuse any pickle where MLflow's setting forbids them, before it is read.

    As in MLflow, the variable is ``true``, ``false``, ``1`` or ``0`` in any case, true if unset; other values are
    refused.
    """
    value = os.environ.get(_ALLOW_PICKLE)
    if value is None or value.lower() in ("true", "1"):
        return
    if value.lower() in ("false", "0"):
        raise UnsafePickleError(
            value=f"{path} is a pickle, and {_ALLOW_PICKLE}={value}",
            rule="no pickle is read where this is false",
            fix="log the live model with amici_eval.log_model where it is trained, or register where it is allowed",
        )
    raise UnsafePickleError(
        value=f"{path} is a pickle, and {_ALLOW_PICKLE}={value[:80]!a}",
        rule="MLflow takes true, false, 1 or 0",
        fix=f"set {_ALLOW_PICKLE}=true to allow pickles, or false to forbid them",
    )


def _check_tensors(weights: Mapping[str, Tensor], size: int) -> None:
    """Refuse tensors that spread a few stored values over a large shape, as copies would fill the memory."""
    if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in weights.items()):
        msg = "its weights are no tensors by name"
        raise TypeError(msg)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    if total > 2 * size:
        msg = f"its weights would take {total} bytes, and the file has {size}"
        raise ValueError(msg)


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


def _plain_dtype(code: str, *options: Any) -> np.dtype[Any]:
    """Return NumPy's own instance of a dtype, on which the ``__setstate__`` that a pickle calls has no effect.

    NumPy's pickles pass align and copy as options. A copy would take flags from the pickle, and an object array could
    then be filled with raw addresses.
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
