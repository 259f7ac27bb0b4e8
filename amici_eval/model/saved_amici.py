"""Reading the pickle that ``AMICI.save`` wrote."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from amici_eval.errors import ModelFormatError, UnsafePickleError, first_line
from amici_eval.model.allow_list import load_allow_listed

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["SavedAMICI", "read_saved_amici"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SavedAMICI:
    """What a ``model.pt`` holds.

    Parameters
    ----------
    attributes
        The model's attributes by name: ``init_params_``, ``registry_``, ``history_``, rows of the splits.
    weights
        The module's state dict, on the CPU.
    """

    attributes: Mapping[str, Any]
    weights: Mapping[str, Tensor]


def read_saved_amici(directory: Path, *, trust: bool) -> SavedAMICI:
    """Return what the ``model.pt`` of a folder holds; this unpickles it.

    Parameters
    ----------
    directory
        Folder with ``model.pt``.
    trust
        ``False``: only the classes that a real AMICI needs are unpickled, anything else is refused. ``True``: plain
        ``torch.load``, which runs whatever code the file holds.

    Raises
    ------
    ModelFormatError
        If the folder holds no AMICI.
    UnsafePickleError
        If the pickle asks for a class or function outside the allow-list.
    """
    path = directory / "model.pt"
    if not path.is_file():
        raise ModelFormatError(
            value=f"{directory} holds no model.pt",
            rule="model_dir must be a folder that AMICI.save(...) wrote",
            fix="correct model_dir",
        )
    if not zipfile.is_zipfile(path):
        raise ModelFormatError(
            value=f"{path} is no torch archive",
            rule="it must be written by AMICI.save(...)",
            fix="copy or save it again",
        )
    try:
        if trust:
            content = torch.load(path, map_location="cpu", weights_only=False)
        else:
            content = load_allow_listed(path)
        attributes, weights = content["attr_dict"], content["model_state_dict"]
        init_params = attributes["init_params_"]["kwargs"]
    except UnsafePickleError:
        raise
    except Exception as error:
        raise ModelFormatError(
            value=f"{path} cannot be read ({first_line(error)})",
            rule="it must be what AMICI.save(...) wrote",
            fix="copy or save it again",
        ) from error
    assert isinstance(init_params, Mapping)  # noqa: S101, RUF100 - for the type checker
    return SavedAMICI(attributes=attributes, weights=weights)
