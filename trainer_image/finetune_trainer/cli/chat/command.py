"""`finetune chat`: one answer, a conversation in the terminal, or base and fine-tuned model side by side."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune_trainer.cli.chat.find_model import FoundModel, find_model
from finetune_trainer.cli.chat.load_model import Workshop, load_speakers
from finetune_trainer.cli.chat.speaker import Message, Sampling, Speaker
from finetune_trainer.cli.export import INTERRUPTED, choose_device
from finetune_trainer.errors import TrainerError
from finetune_trainer.sources import SourceAccess

notes, answers = Console(stderr=True, highlight=False), Console(highlight=False)
HINT = "Ctrl-D ends, Ctrl-C stops an answer, /new begins another conversation"


def chat_here(options: argparse.Namespace) -> int:
    """Loads the model and answers; returns the exit code."""
    sampling = Sampling(options.max_tokens, options.temperature)

    try:
        found = find_model(options.result, options.base, compare=options.compare)
        with tempfile.TemporaryDirectory(prefix="finetune-chat-") as work:
            speakers = _load(found, options, Path(work))
            _talk(speakers, options, sampling)
    except TrainerError as error:
        notes.print(f"{error.reason}: {error.message}", markup=False, soft_wrap=True)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _load(found: FoundModel, options: argparse.Namespace, work: Path) -> list[Speaker]:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    shop = Workshop(choose_device(options.device), work, SourceAccess(options.credentials, hub_cache=True))
    with notes.status(f"loading {escape(str(found.path))}"):
        speakers = load_speakers(found, shop, compare=options.compare)

    notes.print(f"{found.kind.value} {found.path} on {shop.device.type}", markup=False, soft_wrap=True)
    if not speakers[-1].tokenizer.chat_template:
        notes.print("this model has no chat template: it continues your text, and remembers nothing before it")
    return speakers


def _talk(speakers: Sequence[Speaker], options: argparse.Namespace, sampling: Sampling) -> None:
    beginning: list[Message] = [{"role": "system", "content": options.system}] if options.system else []
    prompt = options.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()  # all of it is one prompt
    if prompt is not None:
        _answer(speakers, [*beginning, {"role": "user", "content": prompt}], sampling)
        return

    notes.print(HINT, style="dim")
    messages = list(beginning)
    while True:
        try:
            asked = input("> ").strip()
        except EOFError:
            notes.print()
            return

        if asked == "/new":
            messages = list(beginning)
        elif asked:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": _answer(speakers, messages, sampling)})


def _answer(speakers: Sequence[Speaker], messages: Sequence[Message], sampling: Sampling) -> str:
    """Shows the answer, or both; returns the fine-tuned model's, with which the conversation goes on."""
    if len(speakers) > 1:
        return _show_side_by_side(speakers, messages, sampling)

    said = ""
    try:
        for piece in speakers[0].answer(messages, sampling):
            said += piece
            answers.out(piece, end="", highlight=False)
            sys.stdout.flush()
    except KeyboardInterrupt:  # stops the answer, not the conversation
        if not sys.stdin.isatty():
            raise
    answers.out("")
    return said


def _show_side_by_side(speakers: Sequence[Speaker], messages: Sequence[Message], sampling: Sampling) -> str:
    said = []
    for speaker in speakers:
        with notes.status(f"{speaker.name} answers"):
            said.append("".join(speaker.answer(messages, sampling)))

    table = Table(*(speaker.name for speaker in speakers), expand=True, show_lines=True)
    table.add_row(*map(escape, said))
    answers.print(table)
    return said[-1]
