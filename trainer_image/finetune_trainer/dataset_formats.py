"""What a row means: its layout is recognised or checked, and turned into one of two things, a conversation or a
text."""

from dataclasses import dataclass
from typing import Any

from finetune_api.failures import FailureReason
from finetune_api.spec_inputs import DatasetColumns
from finetune_api.vocabulary import DatasetFormat
from finetune_trainer.errors import TrainerError

ROLES = ("system", "user", "assistant", "tool")


class BadRowError(ValueError):
    """A row cannot be used; the message says what was found and what to write."""


@dataclass(frozen=True)
class Conversation:
    """Messages in the order they are said; assistant turns are the responses."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class PlainText:
    """Text without structure."""

    text: str


Example = Conversation | PlainText


def needed_columns(layout: DatasetFormat, columns: DatasetColumns) -> tuple[str, ...]:
    """Columns that a layout reads."""
    return {
        DatasetFormat.MESSAGES: (columns.messages,),
        DatasetFormat.PROMPT_COMPLETION: (columns.prompt, columns.completion),
        DatasetFormat.TEXT: (columns.text,),
    }[layout]


def detect_format(row: Any, columns: DatasetColumns) -> DatasetFormat:
    """The layout of the first row; raises TrainerError (MissingColumn) where none fits."""
    present = set(row) if isinstance(row, dict) else set()
    for layout in (DatasetFormat.MESSAGES, DatasetFormat.PROMPT_COMPLETION, DatasetFormat.TEXT):
        if set(needed_columns(layout, columns)) <= present:
            return layout
    message = (
        f"the first row has columns {sorted(present)}, but needs {columns.messages}, or {columns.prompt} and "
        f"{columns.completion}, or {columns.text}"
    )
    raise TrainerError(FailureReason.MISSING_COLUMN, message)


def parse_row(row: Any, layout: DatasetFormat, columns: DatasetColumns) -> Example:
    """The example in a row. Raises BadRowError, or TrainerError (MissingColumn)."""
    if not isinstance(row, dict):
        raise BadRowError(f"a row must be an object with named columns, but is a {type(row).__name__}")
    missing = [name for name in needed_columns(layout, columns) if name not in row]
    if missing:
        message = (
            f"format {layout} needs column {' and '.join(missing)}; the row has {', '.join(sorted(row)) or 'none'}"
        )
        raise TrainerError(FailureReason.MISSING_COLUMN, message)
    if layout is DatasetFormat.MESSAGES:
        return Conversation(_check_messages(row[columns.messages], columns.messages), row.get("tools"))
    if layout is DatasetFormat.TEXT:
        return PlainText(_check_text(row[columns.text], columns.text))
    prompt, completion = row[columns.prompt], row[columns.completion]
    if isinstance(prompt, list):
        turns = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return Conversation(_check_messages([*prompt, *turns], columns.prompt), row.get("tools"))
    user = {"role": "user", "content": _check_text(prompt, columns.prompt)}
    return Conversation([user, {"role": "assistant", "content": _check_text(completion, columns.completion)}])


def _check_text(value: Any, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = "empty" if value in ("", None) or isinstance(value, str) else f"a {type(value).__name__}"
        raise BadRowError(f"{column} is {found}; it must be text")
    return value


def _check_messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{column} must be a list of {{role, content}} with at least one entry")
    messages = []
    for index, message in enumerate(value):
        where = f"{column}[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRowError(f"{where} must be an object with role and content")
        if message["role"] not in ROLES:
            raise BadRowError(f"{where}.role is {message['role']!r}; write {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise BadRowError(f"{where}.content must be text, but is a {type(content).__name__}")
        if message["role"] == "assistant" and not message.get("tool_calls") and not str(content).strip():
            raise BadRowError(f"{where}.content is empty: there is nothing to learn from an empty answer")
        messages.append({key: entry for key, entry in message.items() if entry is not None})
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRowError(f"{column} has no assistant turn, so there is nothing to learn")
    return messages
