"""JSON as training data needs it: strict where Python's parser is silent.

Refused with a reason: a key written twice, NaN, numbers beyond a float, half a surrogate pair.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

EXCERPT_CHARACTERS = 40
MAX_LISTED_NAMES = 10


def excerpt(value: Any) -> str:
    """A short value, or the beginning of a long one, for a message.

    Messages reach status, events and logs, where training data have no place.
    """
    shown = repr(value)
    return shown if len(shown) <= EXCERPT_CHARACTERS else f"{shown[:EXCERPT_CHARACTERS]}..."


def listed(names: Iterable[Any]) -> str:
    """The first names, each as an excerpt, and how many more there are; "none" without names."""
    shown = [str(name) if len(str(name)) <= EXCERPT_CHARACTERS else excerpt(name) for name in names]
    more = f" and {len(shown) - MAX_LISTED_NAMES} more" if len(shown) > MAX_LISTED_NAMES else ""
    return (", ".join(shown[:MAX_LISTED_NAMES]) + more) or "none"


def load_strict(text: str) -> Any:
    """The parsed value. Raises ValueError with a reason for people, whatever the text holds."""
    try:
        value = DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    refuse_surrogates(text, value)
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys and values. Raises ValueError if a key occurs twice."""
    entry = dict(pairs)
    if len(entry) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {excerpt(twice)} is written twice")
    return entry


def refuse_constant(name: str) -> Any:
    """Raises ValueError for NaN and Infinity, which Python reads although they are not JSON."""
    raise ValueError(f"{name} is not a JSON value; write null or leave the field out")


def finite(text: str) -> float:
    """The number. Raises ValueError if it is beyond the largest float."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is larger than any number that a 64-bit float can hold")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=refuse_constant, parse_float=finite)
"""One for all rows: `json.loads` would make one for each, a tenth of the time that a row takes."""


def without_nulls(value: Any) -> Any:
    """The value without null fields: tables give every object of a column the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def refuse_surrogates(text: str, value: Any) -> None:
    """Raises ValueError if an escape in `text` left half a surrogate pair in `value`; no tokenizer takes one."""
    if "\\ud" not in text and "\\uD" not in text:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{half} is half of a surrogate pair, which is not a character") from None
