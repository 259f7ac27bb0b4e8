"""Pieces of markup that sections of the page share; arguments that are text are escaped here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from amici_eval.common.text import markup
from amici_eval.report.sentences import rounded

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_MOST_ROWS_AT_ONCE = 30


def section(identifier: str, heading: str, content: str) -> str:
    """Return a part of the page; the heading is markup."""
    return f'<section id="{identifier}"><h2>{heading}</h2>{content}</section>'


def table(
    header: Sequence[str], rows: Iterable[str], caption: str, *, kind: str = "plain", linked: bool = False
) -> str:
    """Return a table with a caption; header and caption are text, rows markup."""
    names = [_head_link(name) if linked else text(name) for name in header]
    cells = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = list(rows)
    tall = " tall" if len(body) > _MOST_ROWS_AT_ONCE else ""
    return (
        f'<p class="caption">{text(caption)}</p>'
        f'<div class="scroll{tall}" tabindex="0" role="region" aria-label="{text(_first_sentence(caption))}">'
        f'<table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def folded(content: str, summary: str, *, is_open: bool = False) -> str:
    """Return a part of the page that a click opens; the summary is text, the content markup."""
    return f"<details{' open' if is_open else ''}><summary>{text(summary)}</summary>{content}</details>"


def row(name: object, cells: Iterable[str]) -> str:
    """Return a row with its name, which is text, and its cells."""
    return f'<tr><th scope="row">{text(name)}</th>{"".join(cells)}</tr>\n'


def cell(value: object, *, words: bool = False, long: bool = False) -> str:
    """Return a cell with a value or, to the left, words; a long text is broken into lines."""
    if words:
        return f'<td class="words{" long" if long else ""}">{text(value)}</td>'
    return f"<td>{text(value)}</td>"


def text(value: object) -> str:
    """Return text as markup: escaped, without control characters."""
    return markup(value)


def cells_text(number: float) -> str:
    """Return a number of cells, which need not be whole, as text that is escaped later."""
    return "undefined" if np.isnan(number) else rounded(number)


def yes_no(value: object, *, missing: str = "") -> str:
    """Return a truth value that may be missing as text that is escaped later."""
    return missing if value is None or value is pd.NA else ("yes" if value else "no")


def _head_link(name: str) -> str:
    """Return the name of a column as markup: that of a head as a link to its section, any other as text."""
    word, _, number = name.partition(" ")
    return f'<a href="#head-{number}">{text(name)}</a>' if word == "Head" and number.isdecimal() else text(name)


def _first_sentence(caption: str) -> str:
    """Return the first sentence of a caption, because the name that is read out for a table should be short."""
    return f"{caption.partition('. ')[0].rstrip('.')}."
