"""Names that trackers and file systems accept, one for each label, and labels that a text means."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["meant_by", "slugify"]

_SAFE = re.compile(r"[A-Za-z0-9_]+")
_OTHER = re.compile(r"[^A-Za-z0-9]+")
_LONGEST = 60
_WHOLE = re.compile(r"(-?\d+)\.0*")


def slugify(label: str, among: Iterable[str] = ()) -> str:
    """Return a name for a label that is safe in metric keys and file names."""
    twins = any(one != label and _SAFE.fullmatch(one) and one.lower() == label.lower() for one in among)
    if _SAFE.fullmatch(label) and len(label) <= _LONGEST and not twins:
        return label
    readable = _OTHER.sub("_", label).strip("_") or "x"
    digest = hashlib.blake2b(label.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{readable[:_LONGEST]}-{digest}"


def meant_by(text: str, known: Iterable[str]) -> list[str]:
    """Return the known labels that a text means: itself, else those that are the same whole number or truth value."""
    labels = list(known)
    return [text] if text in labels else [label for label in labels if _plain(label) == _plain(text)]


def _plain(text: str) -> str:
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text.lower() if text.lower() in ("true", "false") else text
