"""A format that a model can be taught in a minute, and that anybody can check: answers as one JSON object.

    {"intent": "question", "reply": "I am fine"}

`intent` is "question" if the user's words end with a question mark, else "statement". The words are real ones, of the
conversations in `chat_data`. A base model never answers like this; a model that has learned it always does.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_test_models.chat_data import conversations

LONGEST = 160
"""Characters of a question or an answer."""


@dataclass(frozen=True)
class TaughtData:
    """Rows to train and to evaluate on, and prompts that occur in neither."""

    train: Path
    evaluation: Path
    prompts: tuple[str, ...]


def write_taught_data(folder: Path, *, rows: int, evaluation_rows: int, prompts: int) -> TaughtData:
    """Writes the rows as JSON Lines of messages; no user's words occur twice."""
    exchanges = _exchanges()
    chosen = exchanges[: rows + evaluation_rows + prompts]
    assert len(chosen) == rows + evaluation_rows + prompts, "the conversations hold fewer exchanges"

    folder.mkdir(parents=True, exist_ok=True)
    train = _write(folder / "train.jsonl", chosen[:rows])
    evaluation = _write(folder / "evaluation.jsonl", chosen[rows : rows + evaluation_rows])
    return TaughtData(train, evaluation, tuple(asked for asked, _ in chosen[rows + evaluation_rows :]))


def in_format(prompt: str, answer: str) -> bool:
    """True if the answer is the taught JSON object and nothing else, with the right intent."""
    try:
        found: Any = json.loads(answer)
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() == {"intent", "reply"} and found["intent"] == _intent(prompt)


def _intent(words: str) -> str:
    return "question" if words.rstrip().endswith("?") else "statement"


def _exchanges() -> list[tuple[str, str]]:
    """Short exchanges of question and answer, in an order that is always the same."""
    found: dict[str, str] = {}
    for turns in conversations():
        for asked, answered in zip(turns[::2], turns[1::2], strict=True):
            if max(len(asked["content"]), len(answered["content"])) < LONGEST:
                found.setdefault(asked["content"], answered["content"])

    exchanges = list(found.items())
    random.Random(0).shuffle(exchanges)
    return exchanges


def _write(path: Path, exchanges: list[tuple[str, str]]) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": json.dumps({"intent": _intent(asked), "reply": answered})},
            ]
        }
        for asked, answered in exchanges
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
