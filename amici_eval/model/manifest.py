"""SHA-256 of the files of a saved model: tells a damaged file, and is no signature."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from amici_eval.errors import ModelFormatError

__all__ = ["CELLS", "MANIFEST", "SETUP", "WEIGHTS", "check_manifest", "damaged", "listed_files", "write_manifest"]

WEIGHTS = "weights.safetensors"
SETUP = "model.json"
CELLS = "cells.json"
MANIFEST = "manifest.json"


def write_manifest(directory: Path) -> None:
    """Record the SHA-256 of every file of a saved model."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != MANIFEST)
    sums = {path.name: _sha256(path) for path in files}
    (directory / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def damaged(directory: Path, what: str) -> ModelFormatError:
    """Return the error for a model whose files are not as they were logged."""
    return ModelFormatError(
        value=f"the model in {directory} is damaged: {what}",
        rule="its files must be as they were logged",
        fix="download it again or register the model again",
    )


def listed_files(directory: Path) -> set[str]:
    """Return the names of the files that the manifest of a checked folder vouches for."""
    return set(json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["sha256"])


def check_manifest(directory: Path) -> None:
    """Refuse a folder in which a file is missing or not the one that was saved."""
    try:
        sums = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        missing = sorted({WEIGHTS, SETUP, CELLS} - set(sums))
        if missing:
            raise damaged(directory, f"the manifest lacks {missing[0]}")
        for name, expected in sums.items():
            if Path(name).name != name:
                raise damaged(directory, f"the manifest names {name!r}, which is no plain file name")
            path = directory / name
            if path.is_symlink():
                raise damaged(directory, f"{name} is a link")
            if not path.is_file():
                raise damaged(directory, f"{name} is missing")
            if _sha256(path) != expected:
                raise damaged(directory, f"{name} is not the file that was logged (SHA-256 differs)")
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ModelFormatError):
            raise
        raise damaged(directory, f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
