"""Front matter: the YAML block at the beginning of a README.md on the Hub. Pure: text in, text out."""

import re

CARD = "README.md"
MAX_CARD_BYTES = 4 * 2**20
MAX_FRONT_MATTER_CHARACTERS = 2**20
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def find_front_matter(card: str) -> str | None:
    """Returns the YAML text; None if there is none, or if it is longer than 1 Mi characters."""
    found = _FRONT_MATTER.match(card)
    return found[1] if found and len(found[1]) <= MAX_FRONT_MATTER_CHARACTERS else None
