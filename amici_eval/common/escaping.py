"""Text that comes from models and data, made safe for each format that it is written in: the one place that escapes.

Labels, names, tags and messages may hold anything. Each function takes such a text and returns what stands for exactly
this text in its format, and for nothing else: no markup, formula, column, line or command comes of it.
"""

from __future__ import annotations

import html
import re

__all__ = [
    "code_block",
    "csv_text",
    "from_csv_text",
    "literal",
    "markdown",
    "markup",
    "printable",
    "terminal_text",
    "xml_text",
]

# control characters (terminals obey them), line separators, marks that turn the direction of writing or are not seen,
# lone surrogates and non-characters, which XML and UTF-8 cannot hold
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]#!|<>~&@$])")
_LINK = re.compile(r"(?i):(?=//)|(?<=\bwww)\.")
_BLOCK = re.compile(r"^(\s*)([-+=]|\d+(?=[.)]))")
# OWASP's list; the wide forms count as these in some spreadsheets
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_GUARDED = re.compile(r"'+[=+\-@\t\r\n＝＋－＠]")


def printable(text: object, *, longest: int | None = None) -> str:
    r"""Return text that is safe to draw and print, on one line."""
    safe = _UNPRINTABLE.sub(_shown, str(text))
    return safe if longest is None or len(safe) <= longest else safe[: longest - 1] + "…"


def markup(text: object) -> str:
    """Return text for HTML, in an element or in a quoted attribute."""
    return html.escape(printable(text))


def xml_text(text: object) -> str:
    """Return text that XML 1.0 can hold once its writer has escaped ``&`` and ``<``."""
    # the rest of what XML forbids is unprintable
    return printable(text)


def literal(text: str) -> str:
    """Return text that matplotlib draws as it is; else it takes what stands between two dollars for mathematics."""
    return text.replace("$", r"\$")


def markdown(text: object) -> str:
    """Return text for GitHub's Markdown, on one line: within a paragraph, a heading, a list or a cell of a table."""
    safe = _MARKDOWN.sub(r"\\\1", printable(text))
    return _BLOCK.sub(_unblocked, _LINK.sub(r"\\\g<0>", safe))


def code_block(lines: list[str]) -> str:
    """Return lines as a block of code in Markdown; the fence is longer than any within."""
    safe = [printable(line) for line in lines]
    longest = max((len(found) for line in safe for found in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence, *safe, fence])


def csv_text(text: str) -> str:
    """Return a text for a cell of a CSV file: what a spreadsheet would take for a formula gets an apostrophe before.

    Notes
    -----
    As OWASP's page on CSV injection recommends. So that it can be undone, a text that has apostrophes before such a
    character gets one more.
    """
    return f"'{text}" if _FORMULA.match(text) else text


def from_csv_text(text: str) -> str:
    """Undo :func:`csv_text`."""
    return text[1:] if _GUARDED.match(text) else text


def terminal_text(text: str, *, commands: bool = False) -> str:
    """Return text for a terminal or a log: line breaks and tabs stay, other unprintable characters are shown."""
    safe = _UNPRINTABLE.sub(lambda found: found[0] if found[0] in "\n\t" else _shown(found), text)
    if commands:
        safe = re.sub(r"(?m)^(\s*):(?=:)", r"\1\\x3a", safe).replace("##[", r"#\x23[")
    return safe


def _shown(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _unblocked(found: re.Match[str]) -> str:
    # "1." would begin a list: its dot is escaped by the digit's being followed by a backslash
    return f"{found[1]}{found[2]}\\" if found[2].isdigit() else f"{found[1]}\\{found[2]}"
