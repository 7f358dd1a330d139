"""Real conversations for the demo and the end-to-end tests: the `chitchat-dataset` package (MIT) as chat messages.

Two people chat; the first becomes the user, the second the assistant. Only whole exchanges are kept.

    python -P -m finetune_test_models.chat_data FILE        write all conversations, of any length
"""

import json
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

MAX_CHARACTERS = 1200


def conversations(max_characters: int = MAX_CHARACTERS) -> Iterator[list[dict[str, str]]]:
    """Conversations of at most `max_characters`, as lists of {role, content}, user first, assistant last, in the
    package's order."""
    # Read here: the package's own loader leaves its file open.
    source = json.loads(files("chitchat_dataset").joinpath("dataset.json").read_text(encoding="utf-8"))
    for conversation in source.values():
        turns = ["\n".join(message["text"] for message in turn).strip() for turn in conversation["messages"]]
        turns = turns[: len(turns) // 2 * 2]
        if turns and all(turns) and sum(map(len, turns)) <= max_characters:
            yield [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def write_jsonl(path: Path, rows: int, max_characters: int = MAX_CHARACTERS) -> Path:
    """Write the first `rows` conversations of at most `max_characters` as {"messages": [...]} lines."""
    with path.open("w", encoding="utf-8") as file:
        for _, messages in zip(range(rows), conversations(max_characters), strict=False):
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


if __name__ == "__main__":
    write_jsonl(Path(sys.argv[1]), sys.maxsize, sys.maxsize)
