"""SHA-256 of the files of a saved model, which shows damage but is no signature."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import ModelFormatError
from amici_eval.common.untrusted import check_is_plain_file, load_json, odd_character

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "CELLS",
    "MANIFEST",
    "SETUP",
    "WEIGHTS",
    "check_manifest",
    "check_recorded",
    "damaged",
    "listed_files",
    "sums_of",
    "write_manifest",
]

WEIGHTS = "weights.safetensors"
SETUP = "model.json"
CELLS = "cells.json"
MANIFEST = "manifest.json"
_MOST_BYTES = 2**20


def write_manifest(directory: Path) -> None:
    """Write the SHA-256 of every file of a saved model."""
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
    """Return the error for a model whose files changed since they were logged."""
    return ModelFormatError(
        value=f"the model in {directory} is damaged: {what}",
        rule="its files must be as they were logged (a SHA-256 tells damage; it is no signature)",
        fix="download it again or register the model again",
    )


def sums_of(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a saved model, including the manifest."""
    return {path.name: _sha256(path) for path in sorted(directory.iterdir()) if path.is_file()}


def listed_files(directory: Path) -> set[str]:
    """Return the names of the files in the manifest of a checked folder."""
    return set(_listed(directory))


def _listed(directory: Path) -> dict[str, str]:
    sums = load_json(directory / MANIFEST, limit=_MOST_BYTES, max_values=_MOST_BYTES)["sha256"]
    if not isinstance(sums, dict):
        msg = "sha256 is no mapping"
        raise ValueError(msg)  # noqa: TRY004, RUF100 - readers catch one kind
    return sums


def check_recorded(directory: Path, sums: Any) -> None:
    """Refuse a folder with a file whose SHA-256 differs from that in MLmodel."""
    if not isinstance(sums, dict) or not {WEIGHTS, SETUP, CELLS, MANIFEST} <= set(sums):
        raise damaged(directory, f"MLmodel does not record the SHA-256 of {MANIFEST} and the files it lists")
    _compare(directory, sums, "MLmodel", "is corrupted: it is not the file that was logged (SHA-256 differs)")


def check_manifest(directory: Path) -> None:
    """Refuse a folder in which a file is missing or differs from the saved one."""
    try:
        sums = _listed(directory)
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise damaged(directory, f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    missing = sorted({WEIGHTS, SETUP, CELLS} - set(sums))
    if missing:
        raise damaged(directory, f"the manifest lacks {missing[0]}")
    _compare(directory, sums, "the manifest", "is not the file that was logged (SHA-256 differs)")


def _compare(directory: Path, sums: Mapping[str, Any], where: str, what: str) -> None:
    for name, expected in sums.items():
        if not isinstance(name, str) or Path(name).name != name or odd_character(name) is not None:
            raise damaged(directory, f"{where} names {name!a:.80}, which is no plain file name")
        path = directory / name
        try:
            if path.is_symlink():
                raise damaged(directory, f"{name} is a link")
            if not path.exists():
                raise damaged(directory, f"{name} is missing")
            check_is_plain_file(path)
            found = _sha256(path)
        except (OSError, ValueError) as error:
            if isinstance(error, ModelFormatError):
                raise
            raise damaged(directory, f"{name[:200]} cannot be read ({error})") from error
        if found != expected:
            raise damaged(directory, f"{name} {what}")
