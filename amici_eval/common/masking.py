"""What must not be told: passwords, tokens and signatures in texts and settings."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["MASK", "is_secret_name", "mask_mapping", "mask_secrets", "masked"]

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
# what stands for nothing is no secret, and what is masked stays as it is
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
# credentials that show by their form what they are
_SHAPES = re.compile(
    r"\b(?:A[KS]IA[0-9A-Z]{16}|gh[pousr]_\w{30,}|github_pat_\w{20,}|glpat-[\w-]{20,}|hf_\w{30,}|dapi[0-9a-f]{32}|"
    r"xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}|ya29\.[\w-]{20,}|sk_live_\w{16,}|glsa_\w{20,}|sk-[\w-]{20,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
)
_PEM = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----)[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)")


def mask_secrets(text: str) -> str:
    """Return a text without what looks like a credential.

    Notes
    -----
    It goes by form: a password alone, with nothing that says what it is, is not recognised. A masked text stays as it
    is when it is masked again.
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
    """Return plain nested values without credentials: texts masked, and what a secret name stands for left out."""
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
    # a group of settings under such a name is looked into: "auth: {method: ...}"
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
