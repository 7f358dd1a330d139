"""Splits real conversations: long ones to read before any fine-tuning, short ones to fine-tune on and to hold out."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from held_out.job import Rows

MAX_CHARACTERS = 1200
"""Of a conversation to fine-tune on, so that none is cut at the job's maxSequenceLength."""
HELD_OUT = 400
Conversation = dict[str, Any]
"""{"messages": [{"role": ..., "content": ...}, ...]}"""


@dataclass(frozen=True)
class Split:
    """Conversations by their use; no conversation is in two of them."""

    reading: list[Conversation]
    train: list[Conversation]
    held_out: list[Conversation]

    def write_rows(self, folder: Path) -> Rows:
        """Writes the rows of the jobs below `folder`."""
        rows = Rows(folder / "train.jsonl", folder / "held_out.jsonl")
        _write(rows.train, self.train)
        _write(rows.held_out, self.held_out)
        return rows


def split(path: Path, *, train: int | None = None, held_out: int = HELD_OUT) -> Split:
    """Reads conversations, a JSON object a line; the last `held_out` of the short ones are held out. `train` limits
    the number of those to train on."""
    lines = path.read_text(encoding="utf-8").splitlines()
    conversations = [json.loads(line) for line in lines]
    is_short = [_characters(conversation) <= MAX_CHARACTERS for conversation in conversations]

    short = [conversation for conversation, fits in zip(conversations, is_short, strict=True) if fits]
    long = [conversation for conversation, fits in zip(conversations, is_short, strict=True) if not fits]
    if len(short) <= held_out or not long:
        raise ValueError(
            f"{path}: more than {held_out} conversations of at most {MAX_CHARACTERS} characters are needed"
        )
    return Split(long, short[:-held_out][:train], short[-held_out:])


def _characters(conversation: Conversation) -> int:
    return sum(len(message["content"]) for message in conversation["messages"])


def _write(path: Path, conversations: list[Conversation]) -> None:
    lines = [json.dumps(conversation, ensure_ascii=False) for conversation in conversations]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
