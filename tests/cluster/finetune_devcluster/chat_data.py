"""Real conversations for the demo and the end-to-end tests: the `chitchat-dataset` package (MIT) as chat messages.

Two people chat; the first becomes the user, the second the assistant. Only whole exchanges are kept.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import chitchat_dataset

MAX_CHARACTERS = 1200


def conversations() -> Iterator[list[dict[str, str]]]:
    """Conversations as lists of {role, content}, user first, assistant last, in the package's order."""
    for conversation in chitchat_dataset.Dataset().values():
        turns = ["\n".join(message["text"] for message in turn).strip() for turn in conversation["messages"]]
        turns = turns[: len(turns) // 2 * 2]
        if turns and all(turns) and sum(map(len, turns)) <= MAX_CHARACTERS:
            yield [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def write_jsonl(path: Path, rows: int) -> Path:
    """Write the first `rows` conversations as {"messages": [...]} lines."""
    with path.open("w", encoding="utf-8") as file:
        for _, messages in zip(range(rows), conversations(), strict=False):
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path
