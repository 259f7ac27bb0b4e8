"""What a malformed model or data file is: how it is made, and what reads it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any


@dataclass(frozen=True)
class Base:
    """Folders and files that are sound: each case spoils a copy of one."""

    folder: Path

    def copy(self, name: str, into: Path) -> Path:
        """Copy ``model`` (stored, its AnnData bundled), ``saved`` (by AMICI.save), ``tissue.h5ad`` or ``.zarr``."""
        source, target = self.folder / name, into / name
        return shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def spoilt(name: str, change: Callable[[Path], Any]) -> Callable[[Base, Path], Path]:
    """Return a builder that copies something sound and changes the copy."""

    def build(base: Base, into: Path) -> Path:
        path = base.copy(name, into)
        change(path)
        return path

    return build


@dataclass(frozen=True)
class Case:
    """One malformed model or file.

    Parameters
    ----------
    name
        Says what is wrong with it.
    kind
        ``model``: a stored model; ``saved``: a folder with ``model.pt``; ``data``: an AnnData; ``moments``: moments of
        an evaluation.
    build
        Makes it in a folder and returns what is handed to the reader.
    """

    name: str
    kind: str
    build: Callable[[Base, Path], Path]


def read(kind: str, target: Path) -> None:
    """Hand a model or file to its reader."""
    if kind == "model":
        from amici_eval.data.files import open_anndata
        from amici_eval.tracking.flavor import open_stored_model

        with open_stored_model(str(target)) as stored:
            if stored.bundled_adata is not None:
                open_anndata(stored.bundled_adata)
    elif kind == "saved":
        from amici_eval.model.checkpoint import read_amici_directory

        read_amici_directory(target, adata=None, trust=False)
    elif kind == "data":
        from amici_eval.data.checks import coordinates_of, expression_matrix
        from amici_eval.data.files import open_anndata

        adata = open_anndata(target)
        coordinates_of(adata, "spatial")
        expression_matrix(adata, None)
    else:
        from amici_eval.results.moments import Moments

        Moments.load(target)
