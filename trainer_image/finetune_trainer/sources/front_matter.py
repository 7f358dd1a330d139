"""The YAML block that a README.md on the Hub may begin with. Pure: text in, text out."""

import re

CARD = "README.md"
MAX_CARD_BYTES = 4 * 2**20
MAX_FRONT_MATTER_CHARACTERS = 2**20
_BLOCK = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def find_front_matter(card: str) -> str | None:
    """The block's text; None where there is none, or more of it than anyone writes."""
    block = _BLOCK.match(card)
    return block[1] if block and len(block[1]) <= MAX_FRONT_MATTER_CHARACTERS else None
