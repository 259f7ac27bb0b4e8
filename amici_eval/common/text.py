"""Text that comes from models, data and settings, made safe to write: escaped for each format, secrets redacted.

Labels, names, tags and messages may hold anything. Each escaping function returns what stands for exactly this text in
its format, so that it never becomes markup, a formula, a column, a line or a command.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import html
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

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
    """Return a text for a cell of a CSV file, after an apostrophe if a spreadsheet would take it for a formula.

    As OWASP's page on CSV injection recommends. A text that already has apostrophes before such a character gets one
    more, so that :func:`from_csv_text` can undo it.
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
    # "1." would begin a list: a backslash after the digit escapes its dot
    return f"{found[1]}{found[2]}\\" if found[2].isdigit() else f"{found[1]}\\{found[2]}"


MASK = "***"

# a password may hold "/" and "@": the user's part ends at the last "@" of the word, unless what follows the colon is a
# port; a database's URI has no other "@"
_DATABASE = r"(?:postgres(?:ql)?|mysql|mariadb|mssql|oracle|mongodb|redis|rediss|amqps?)(?:\+\w+)?"
_WORD = r'(?:(?!://)[^\s"])'
_DATABASE_USER = re.compile(rf"(?i)\b({_DATABASE}://){_WORD}*@")
_USER_PASSWORD = re.compile(rf"(?<=://)[^\s/?#@:'\"<>]*:(?!\d{{1,5}}(?:[/?#'\"\s<>),;\]]|$)){_WORD}*@")
# without a password: a token, but not the container that Azure writes there
_USER = re.compile(r"(?i)(?<!abfs://)(?<!abfss://)(?<!wasb://)(?<!wasbs://)(?<=://)[^\s/@'\"<>]+@")
_QUERY = re.compile(r"\?[^\s=?'\"<>()]{1,80}=[^\s'\"<>)]*")

_SECRET_WORD = (
    r"(?:pass(?:[_-]?word|wd|[_-]?phrase)|secret(?!or|e[dst]|in)|token(?!i[sz]|s(?![a-z]))|credential|api[_-]?key|access[_-]?key|account[_-]?key|"
    r"private[_-]?key|shared[_-]?access[_-]?signature|x-amz-signature|connection[_-]?string)"
)
_SECRET_PART = r"(?:pwd|auth|cookie|bearer|apikey|(?<![_/-])(?:sig|sas|pass))"
_NAME = re.compile(rf"(?i){_SECRET_WORD}|(?<![a-z])(?:{_SECRET_PART}|authorization)(?![a-z])")
# null, booleans and interpolations are no secrets; what is masked stays as it is
_VALUE = (
    r"(?!['\"]?\*\*\*|''|\"\"|(?:null|none|true|false|\$\{[^}]*\})(?=[\s,;&'\")\]}]|$))"
    r"(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s'\"<>]+)"
)
_WORD_NAME, _PART_NAME = rf"{_SECRET_WORD}[\w-]{{0,40}}", rf"(?<![a-z]){_SECRET_PART}(?![a-z])[\w-]{{0,40}}"
_ASSIGNED = re.compile(rf"(?i)((?:{_WORD_NAME}|{_PART_NAME})['\"]?\s{{0,3}}=\s{{0,3}})({_VALUE})")
# "pass: ..." is prose
_TOLD = re.compile(rf"(?i)((?:{_WORD_NAME}|(?<![a-z])(?:pwd|cookie)(?![a-z]))['\"]?:\s{{0,3}})({_VALUE})")
_FLAG = re.compile(rf"(?i)(--[\w-]{{0,40}}{_WORD_NAME}\s+)({_VALUE})")
_HEADER = re.compile(
    r"(?i)(\b(?:proxy-)?authorization['\"]?\s{0,3}[:=]\s{0,3}['\"]?(?:(?:bearer|basic|token|digest|negotiate)\s+)?)"
    r"[^\s'\",;]+"
)
_BEARER = re.compile(r"(?i)\b(bearer\s+)(?=[\w.~+/=-]*[\d._~+/=-])[\w.~+/=-]{8,}")
_BASIC = re.compile(r"(?i)\b(basic\s+)([a-z0-9+/]{4,}={0,2})")
# credentials with a known form
_SHAPES = re.compile(
    r"\b(?:A[KS]IA[0-9A-Z]{16}|gh[pousr]_\w{30,}|github_pat_\w{20,}|glpat-[\w-]{20,}|hf_\w{30,}|dapi[0-9a-f]{32}|"
    r"xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}|ya29\.[\w-]{20,}|sk_live_\w{16,}|glsa_\w{20,}|sk-[\w-]{20,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
)
_PEM = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----)[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)")


def mask_secrets(text: str) -> str:
    """Return a text without what looks like a credential.

    Only the form counts: a bare password, with nothing that says what it is, is not recognised. Masking a masked text
    again does not change it.
    """
    text = _DATABASE_USER.sub(rf"\1{MASK}@", text)
    text = _USER.sub(f"{MASK}@", _USER_PASSWORD.sub(f"{MASK}@", text))
    text = _QUERY.sub(f"?{MASK}", text)
    text = _PEM.sub(rf"\1{MASK}", text)
    text = _HEADER.sub(rf"\1{MASK}", text)
    text = _BASIC.sub(_without_basic, _BEARER.sub(rf"\1{MASK}", text))
    for pattern in (_ASSIGNED, _TOLD, _FLAG):
        text = pattern.sub(_without_value, text)
    return _SHAPES.sub(MASK, text)


def is_secret_name(name: str) -> bool:
    """Return whether a setting of this name holds a credential, as ``tracking.tags.token`` does."""
    return _NAME.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)) is not None


def masked(value: Any) -> Any:
    """Return plain nested values without credentials: texts are masked, values of secret names are replaced."""
    if isinstance(value, str):
        return mask_secrets(value)
    if isinstance(value, Mapping):
        return mask_mapping(value)
    if isinstance(value, (list, tuple)):
        return [masked(item) for item in value]
    return value


def mask_mapping(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return settings or tags without credentials; see :func:`masked`."""
    return {
        mask_secrets(key) if isinstance(key, str) else key: (
            MASK if isinstance(key, str) and is_secret_name(key) and _is_told(value) else masked(value)
        )
        for key, value in values.items()
    }


def _is_told(value: Any) -> bool:
    # a group of settings under a secret name is masked item by item: "auth: {method: ...}"
    return not (value is None or value == "" or isinstance(value, (bool, Mapping)))


def _without_value(found: re.Match[str]) -> str:
    quote = found[2][0] if found[2][0] in "'\"" and found[2][0] == found[2][-1] else ""
    return f"{found[1]}{quote}{MASK}{quote}"


def _without_basic(found: re.Match[str]) -> str:
    # "basic statistics" is prose: what is masked must decode to "user:password"
    try:
        decoded = base64.b64decode(found[2], validate=True)
    except (binascii.Error, ValueError):
        return found[0]
    return f"{found[1]}{MASK}" if b":" in decoded else found[0]


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
    """Return the known labels that a text means: itself, else those of the same whole number or truth value."""
    labels = list(known)
    return [text] if text in labels else [label for label in labels if _plain(label) == _plain(text)]


def _plain(text: str) -> str:
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text.lower() if text.lower() in ("true", "false") else text
