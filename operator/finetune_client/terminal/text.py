"""Text of a cluster for a terminal: whoever writes a status, an event or a log must not write to the screen."""

import re
import unicodedata
from datetime import UTC, datetime
from typing import Any

MAX_CHARACTERS = 1024
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)?|\x1b.|\x9b[0-?]*[ -/]*[@-~]")
"""Sequences that a terminal obeys: colours and cursor (CSI), titles and links (OSC), and those of two characters."""

_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Categories of control characters, of marks that change the direction of writing, and of line separators."""


def clean(value: object, limit: int = MAX_CHARACTERS) -> str:
    """Return one line without escape sequences and control characters, of at most `limit` characters."""
    # A long text is cut before it is looked at, so that nobody pays for its length.
    line = _ESCAPES.sub("", str(value)[: 4 * limit]).replace("\t", "    ").replace("\n", " ")
    line = "".join(each for each in line if unicodedata.category(each) not in _INVISIBLE)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def find(document: Any, *path: str) -> Any:
    """Return the value at a path of nested objects; None where one of them is missing or no object."""
    for name in path:
        document = document.get(name) if isinstance(document, dict) else None
    return document


def word(document: Any, *path: str, limit: int = MAX_CHARACTERS) -> str:
    """Return the text at a path of nested objects, cleaned; empty where there is none."""
    value = find(document, *path)
    return "" if value is None else clean(value, limit)


def number(document: Any, *path: str) -> float | None:
    """Return the number at a path of nested objects; None where there is none."""
    value = find(document, *path)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def age(timestamp: str, now: datetime | None = None) -> str:
    """Return the time since an RFC 3339 timestamp as kubectl writes it: 45s, 12m, 3h, 8d."""
    try:
        began = datetime.fromisoformat(timestamp)
    except ValueError:
        return "unknown"
    seconds = max(0, int(((now or datetime.now(UTC)) - began).total_seconds()))
    for unit, size, until in (("s", 1, 120), ("m", 60, 7200), ("h", 3600, 172_800)):
        if seconds < until:
            return f"{seconds // size}{unit}"
    return f"{seconds // 86_400}d"
