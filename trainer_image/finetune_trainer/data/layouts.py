"""Layouts of rows: recognises or checks a row's layout, and parses the row into a conversation or a plain text."""

from dataclasses import dataclass
from typing import Any

from finetune_api.failures import FailureReason
from finetune_api.spec.inputs import DatasetColumns
from finetune_api.vocabulary import DatasetFormat
from finetune_trainer.data.media import refuse_media
from finetune_trainer.data.messages import BadRowError, parse_json_text, parse_messages
from finetune_trainer.data.strict_json import listed, load_strict
from finetune_trainer.data.tools import leave_out_nulls, parse_tools
from finetune_trainer.errors import TrainerError

# In this order: a row that fits several layouts is taken for the first, as later columns often repeat earlier ones.
LAYOUTS = (
    DatasetFormat.MESSAGES,
    DatasetFormat.SHAREGPT,
    DatasetFormat.PROMPT_COMPLETION,
    DatasetFormat.ALPACA,
    DatasetFormat.TEXT,
)
NEEDED = {
    DatasetFormat.MESSAGES: ("messages",),
    DatasetFormat.SHAREGPT: ("conversations",),
    DatasetFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DatasetFormat.ALPACA: ("instruction", "output"),
    DatasetFormat.TEXT: ("text",),
}
"""Fields of DatasetColumns that name the columns which a row of each layout must have."""
# Other names under which prompts and completions are found: suggested in the error, never assumed.
USUAL_PROMPTS = ("question", "query", "instruction", "input", "prompt", "user")
USUAL_COMPLETIONS = ("answer", "response", "output", "completion", "assistant", "chosen")


@dataclass(frozen=True)
class Conversation:
    """Messages in the order in which they are said; the assistant's are the answers to learn."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    context: frozenset[int] = frozenset()
    """Indices of assistant messages that carry no loss."""
    is_continuation: bool = False
    """True for a prompt whose completion goes on where it ends, so that both join where there is no chat template."""


@dataclass(frozen=True)
class PlainText:
    """Text without structure; all of it is learned."""

    text: str


Example = Conversation | PlainText


def needed_columns(layout: DatasetFormat, columns: DatasetColumns) -> tuple[str, ...]:
    """Columns that a row of this layout must have."""
    return tuple(getattr(columns, name) for name in NEEDED[layout])


def detect_format(row: Any, columns: DatasetColumns) -> DatasetFormat:
    """The layout of the first row. Raises TrainerError (MissingColumn) if no layout fits."""
    present = set(row) if isinstance(row, dict) else set()
    for layout in LAYOUTS:
        if set(needed_columns(layout, columns)) <= present:
            return layout

    choices = ", or ".join(" and ".join(needed_columns(layout, columns)) for layout in LAYOUTS)
    message = f"the first row has columns {listed(sorted(present))}, but needs {choices}{_suggest(present)}"
    raise TrainerError(FailureReason.MISSING_COLUMN, message)


def describe_detection(row: Any, layout: DatasetFormat, columns: DatasetColumns) -> str:
    """The detected layout with the columns used and not used, for the log and the report."""
    optional = {columns.tools, columns.system, columns.input}
    used = sorted(name for name in row if name in {*needed_columns(layout, columns), *optional})
    unused = sorted(name for name in row if name not in used)
    return f"{layout}, by column {' and '.join(used)}" + (f"; not used: {listed(unused)}" if unused else "")


def parse_row(row: Any, layout: DatasetFormat, columns: DatasetColumns) -> Example:
    """The example in a row. Raises BadRowError, or TrainerError (MissingColumn)."""
    if not isinstance(row, dict):
        raise BadRowError(f"a row must be an object with named columns, but is a {type(row).__name__}")
    needed = needed_columns(layout, columns)
    missing = [name for name in needed if name not in row]
    if missing:
        message = f"format {layout} needs column {' and '.join(missing)}, but the row has {listed(sorted(row))}"
        raise TrainerError(FailureReason.MISSING_COLUMN, message)

    is_chat = layout in (DatasetFormat.MESSAGES, DatasetFormat.SHAREGPT)
    refuse_media(row, needed, is_chat=is_chat)
    if layout is DatasetFormat.TEXT:
        return PlainText(_check_text(row[columns.text], columns.text))
    if layout is DatasetFormat.ALPACA:
        return Conversation(_system(row, columns) + _alpaca_turns(row, columns))
    if layout is DatasetFormat.PROMPT_COMPLETION:
        return _prompt_and_completion(row, columns)

    column = columns.messages if layout is DatasetFormat.MESSAGES else columns.conversations
    messages, context = parse_messages(row[column], column)
    tools = parse_tools(row.get(columns.tools), columns.tools)

    # ShareGPT often keeps the system prompt in a column of its own.
    if layout is DatasetFormat.SHAREGPT and messages[0]["role"] != "system" and (system := _system(row, columns)):
        messages, context = system + messages, frozenset(index + 1 for index in context)
    leave_out_nulls(messages, tools)
    return Conversation(messages, tools, context)


def _prompt_and_completion(row: dict[str, Any], columns: DatasetColumns) -> Conversation:
    prompt, completion = row[columns.prompt], row[columns.completion]

    # Files without lists, such as CSV, hold messages as JSON text.
    asked, said = _messages_in_text(prompt), _messages_in_text(completion)
    if asked is not None and said is not None:
        prompt, completion = asked, said

    if isinstance(prompt, list):
        completion = parse_json_text(completion, columns.completion)
        turns = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        # Answers in the prompt were given before: they are read, not learned.
        messages, context = parse_messages([*prompt, *turns], columns.prompt, given=len(prompt))
        tools = parse_tools(row.get(columns.tools), columns.tools)
        leave_out_nulls(messages, tools)
        return Conversation(messages, tools, context)

    user = {"role": "user", "content": _check_text(prompt, columns.prompt)}
    answer = {"role": "assistant", "content": _check_text(completion, columns.completion)}
    return Conversation([*_system(row, columns), user, answer], is_continuation=True)


def _messages_in_text(value: Any) -> list[Any] | None:
    """The messages that a text holds as JSON; None if it is another text."""
    if not isinstance(value, str) or not value.startswith("[{"):
        return None
    try:
        found = load_strict(value)
    except ValueError:
        return None

    is_messages = isinstance(found, list) and all(
        isinstance(entry, dict) and {"role", "content"} <= set(entry) for entry in found
    )
    return found if is_messages else None


def _alpaca_turns(row: dict[str, Any], columns: DatasetColumns) -> list[dict[str, Any]]:
    instruction = _check_text(row[columns.instruction], columns.instruction)
    about = row.get(columns.input)
    if about is not None and not isinstance(about, str):
        raise BadRowError(f"{columns.input} must be text, but is a {type(about).__name__}")

    question = f"{instruction}\n\n{about}" if about and about.strip() else instruction
    answer = _check_text(row[columns.output], columns.output)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(row: dict[str, Any], columns: DatasetColumns) -> list[dict[str, Any]]:
    """The system message in a row's own column; empty without one."""
    text = row.get(columns.system)
    if text is not None and not isinstance(text, str):
        raise BadRowError(f"{columns.system} must be text, but is a {type(text).__name__}")
    return [{"role": "system", "content": text}] if text and text.strip() else []


def _check_text(value: Any, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = "empty" if value in ("", None) or isinstance(value, str) else f"a {type(value).__name__}"
        raise BadRowError(f"{column} must be text, but is {found}")
    return value


def _suggest(present: set[str]) -> str:
    """The columns to write into the manifest if a prompt and a completion are there under other names."""
    prompt = next((name for name in USUAL_PROMPTS if name in present), None)
    completion = next((name for name in USUAL_COMPLETIONS if name in present), None)
    if prompt is None or completion is None:
        return ""
    return f"; perhaps you want spec.dataset.columns: {{prompt: {prompt}, completion: {completion}}}"
