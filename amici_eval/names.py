"""Names that trackers and file systems accept, one for each label."""

from __future__ import annotations

import hashlib
import re

__all__ = ["slugify"]

_SAFE = re.compile(r"[A-Za-z0-9_]+")
_OTHER = re.compile(r"[^A-Za-z0-9]+")
_LONGEST = 60


def slugify(label: str) -> str:
    """Return a name for a label that is safe in metric keys and file names.

    Parameters
    ----------
    label
        Any text, for example a cell type such as ``"CD8+_T_Cells"``, ``"Microglia/PVM"`` or ``"β cell"``.

    Returns
    -------
    str
        The label itself if it has only ASCII letters, digits and ``_``; else these with every other run of characters
        replaced by ``_`` and a hash of the whole label behind a ``-``, so that different labels never share a name
        (``"A+"`` and ``"A/"`` differ). It depends on the label alone, so it is the same in every run.
    """
    if _SAFE.fullmatch(label) and len(label) <= _LONGEST:
        return label
    readable = _OTHER.sub("_", label).strip("_") or "x"
    digest = hashlib.blake2b(label.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{readable[:_LONGEST]}-{digest}"
