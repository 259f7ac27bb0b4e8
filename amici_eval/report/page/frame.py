"""The frame of a page: one file that needs no network; its one script sorts and filters tables."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING

from amici_eval.report.markup import text
from amici_eval.report.sentences import unwritable

if TYPE_CHECKING:
    from pathlib import Path

_SECTION = re.compile(r'<section id="([^"]+)"><h2>(.*?)</h2>')
_FEWEST_LISTED = 3


def write_page(path: Path, *, title: str, body: str) -> Path:
    """Write a page and return its file.

    The page allows only its own styles, pictures within it, and the one script whose SHA-256 it names, so that markup
    that slipped through runs nothing. Without scripts the tables cannot be sorted or filtered.
    """
    style, script = _asset("page.css"), f"\n{_asset('page.js')}"
    digest = b64encode(sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{_with_contents(body)}\n"
        f"</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )
    try:
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def _asset(name: str) -> str:
    return files("amici_eval.report").joinpath("assets", name).read_text(encoding="utf-8")


def _with_contents(body: str) -> str:
    found = list(_SECTION.finditer(body))
    if len(found) < _FEWEST_LISTED:
        return body
    links = "".join(f'<li><a href="#{one[1]}">{one[2]}</a></li>' for one in found)
    place = found[0].start()
    return f'{body[:place]}<nav class="contents" aria-label="Contents"><ul>{links}</ul></nav>\n{body[place:]}'
