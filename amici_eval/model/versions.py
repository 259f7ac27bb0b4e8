"""Which packages a model depends on, as they are installed here."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

__all__ = ["AMICI_SOURCES", "package_versions"]

AMICI_SOURCES = "amici-st sources"
_PACKAGES = ("amici-st", "scvi-tools", "torch", "numpy", "transformer-lens", "amici-eval")


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a model depends on, as installed here, and a digest of AMICI's sources.

    AMICI's development branch has the version number of the release.
    """
    return {**{package: _version(package) for package in _PACKAGES}, AMICI_SOURCES: _amici_sources()}


@cache
def _amici_sources() -> str:
    digest = hashlib.sha256()
    spec = find_spec("amici")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
