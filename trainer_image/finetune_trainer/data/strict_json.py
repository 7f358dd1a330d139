"""JSON as training data needs it: what Python's parser lets pass silently (a key written twice, NaN, numbers beyond a
float, half a surrogate pair) is refused with a reason."""

import json
import math
from collections.abc import Iterable
from typing import Any

EXCERPT_CHARACTERS = 40
LISTED_NAMES = 10


def excerpt(value: Any) -> str:
    """What a message may quote of a row: the beginning of a short value. Reasons reach status, events and logs, where
    training data have no place."""
    shown = repr(value)
    return shown if len(shown) <= EXCERPT_CHARACTERS else f"{shown[:EXCERPT_CHARACTERS]}..."


def listed(names: Iterable[Any]) -> str:
    """The first names, each as an excerpt; none says so."""
    shown = [str(name) if len(str(name)) <= EXCERPT_CHARACTERS else excerpt(name) for name in names]
    more = f" and {len(shown) - LISTED_NAMES} more" if len(shown) > LISTED_NAMES else ""
    return (", ".join(shown[:LISTED_NAMES]) + more) or "none"


def load_strict(text: str) -> Any:
    """The value. Raises ValueError with a reason for people, whatever the text holds."""
    try:
        value = json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    refuse_surrogates(text, value)
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose keys must differ."""
    entry = dict(pairs)
    if len(entry) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {excerpt(twice)} is written twice")
    return entry


def refuse_constant(name: str) -> Any:
    """NaN and Infinity are not JSON, though Python reads them."""
    raise ValueError(f"{name} is not a JSON value; write null or leave the field out")


def finite(text: str) -> float:
    """A float; raises ValueError where it is beyond the largest."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is larger than any number here")
    return value


def refuse_surrogates(text: str, value: Any) -> None:
    """Half a surrogate pair can only come from an escape; no tokenizer takes one. Raises ValueError."""
    if "\\ud" not in text and "\\uD" not in text:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{half} is half of a surrogate pair, which is no character") from None
