"""Pieces of the page: tables, rates, and what to run for a part that is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, the first column to the left."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def rate(value: float | None, error: float | None = None, *, marked: bool = False) -> str:
    """Return a rate with three digits and its standard error; bold if marked."""
    if value is None or np.isnan(value):
        return "–"
    text = f"{value:.3f}".removeprefix("0")
    text = f"**{text}**" if marked else text
    return text if error is None else f"{text} ± {f'{error:.3f}'.removeprefix('0')}"


def missing(title: str, part: str) -> list[str]:
    return [title, f"Not measured: run `python -m tests.calibration {part} report`."]
