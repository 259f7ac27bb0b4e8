"""Reading the pickle that ``AMICI.save`` wrote."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from amici_eval.common.errors import ModelFormatError, UnsafePickleError, first_line
from amici_eval.model.allow_list import check_archive, load_allow_listed

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["SavedAMICI", "SavedFiles", "read_saved_amici", "saved_files", "split_covers", "split_size"]

_MODEL, _ADATA = "model.pt", "adata.h5ad"
_ROWS = ("train_indices_", "validation_indices_", "test_indices_")
_ALLOW_PICKLE = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SavedAMICI:
    """The content of a ``model.pt``.

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


def split_size(attributes: Mapping[str, Any]) -> int:
    """Return the number of cells in the recorded split; 0 if its rows are not 0, 1, ... without gaps."""
    rows = [attributes.get(name) for name in _ROWS]
    known = np.concatenate([np.asarray([] if one is None else one, dtype=np.int64) for one in rows])
    return len(known) if np.array_equal(np.sort(known), np.arange(len(known))) else 0


def split_covers(model: Any, n_cells: int) -> bool:
    """Return whether the split of a live model covers exactly this many cells."""
    return split_size({name: getattr(model, name, None) for name in _ROWS}) == n_cells


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
