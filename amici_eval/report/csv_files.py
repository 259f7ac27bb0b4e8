"""Tables as CSV files that a spreadsheet shows and does not run, and back."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

import pandas as pd

from amici_eval.common.escaping import csv_text, from_csv_text
from amici_eval.report.sentences import unwritable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["read_csv", "write_csv"]


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table; texts that a spreadsheet would take for formulas get an apostrophe before them.

    Notes
    -----
    CSV is UTF-8 with line feeds at line ends, booleans as ``True`` and ``False``, missing values as empty fields and
    floats with all their digits.
    """
    safe = _changed(frame, csv_text)
    # the csv module does not quote a carriage return, at which readers would begin a new row
    breaks = any("\r" in value for name in safe for value in safe[name] if isinstance(value, str))
    try:
        safe.to_csv(
            path,
            index=False,
            encoding="utf-8",
            errors="backslashreplace",
            lineterminator="\n",
            quoting=csv.QUOTE_NONNUMERIC if breaks else csv.QUOTE_MINIMAL,
        )
    except OSError as error:
        raise unwritable(path, error) from error


def read_csv(path: str | Path, **options: Any) -> pd.DataFrame:
    """Read a table with the names that it was written from."""
    return _changed(pd.read_csv(path, **{"float_precision": "round_trip", **options}), from_csv_text)


def _changed(frame: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    changed = frame.copy()
    for name in frame.columns:
        if frame[name].dtype.kind == "O":
            # texts, categories, and objects, which may be numbers beside texts, as "head" of held_out.csv is
            values = [change(value) if isinstance(value, str) else value for value in frame[name]]
            changed[name] = pd.Series(values, index=frame.index, dtype=object)
    return changed
