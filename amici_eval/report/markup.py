"""Pieces of markup that sections of the page share; what is text is escaped here."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from amici_eval.report.wording import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["cell", "row", "section", "table", "text"]


def section(identifier: str, heading: str, content: str) -> str:
    """Return a part of the page; the heading is markup."""
    return f'<section id="{identifier}"><h2>{heading}</h2>{content}</section>'


def table(header: Sequence[str], rows: Iterable[str], caption: str, *, kind: str = "plain") -> str:
    """Return a table with a caption; header and caption are text, rows markup."""
    cells = "".join(f'<th scope="col">{text(name)}</th>' for name in header)
    return (
        f'<p class="caption">{text(caption)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table class="{kind}">'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def row(name: object, cells: Iterable[str]) -> str:
    """Return a row with its name, which is text, and its cells."""
    return f'<tr><th scope="row">{text(name)}</th>{"".join(cells)}</tr>\n'


def cell(value: object, *, words: bool = False) -> str:
    """Return a cell with a value or, to the left, words."""
    return f'<td class="words">{text(value)}</td>' if words else f"<td>{text(value)}</td>"


def text(value: object) -> str:
    """Return text as markup: escaped, without control characters."""
    return escape(printable(value))
