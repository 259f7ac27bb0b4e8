"""The frame of a page: one file that needs no network and runs no script."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from amici_eval.report.markup import text
from amici_eval.report.wording import unwritable

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_page"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_page(path: Path, *, title: str, body: str) -> Path:
    """Write a page and return its file.

    Parameters
    ----------
    path
        The file.
    title
        Text.
    body
        Markup.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    style = files("amici_eval.report").joinpath("report.css").read_text(encoding="utf-8")
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )
    try:
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise unwritable(path, error) from error
    return path
