"""Judges what messages say besides role and text: keys that nobody reads, and calls that no tool declares."""

import re
from collections.abc import Iterator

from finetune_trainer.data.messages import FLAGS
from finetune_trainer.data.strict_json import excerpt, listed
from finetune_trainer.preflight.report import Finding
from finetune_trainer.preflight.tallies.messages import MessageTally

SOURCE = "spec.dataset.source"
MAX_LISTED = 5
"""Keys that the warning names, each with its rows."""


def judge_messages(tally: MessageTally, chat_template: str) -> Iterator[Finding]:
    """Warnings about keys that neither we nor the chat template read, and about calls that no tool declares."""
    flags = [name for name in tally.keys if name in FLAGS]
    read = {name for name in tally.keys if re.search(rf"\b{re.escape(name)}\b", chat_template)}
    unread = [name for name in tally.keys if name not in flags and name not in read]
    if unread:
        keys = "; ".join(f"{excerpt(name)} in {tally.keys[name].named()}" for name in unread[:MAX_LISTED])
        more = f" and {len(unread) - MAX_LISTED} more" if len(unread) > MAX_LISTED else ""
        yield Finding.warning(
            SOURCE,
            f"keys of messages that nothing reads: {keys}{more}; an answer without loss has weight: 0, loss: false or "
            "train: false, and reasoning is in reasoning_content",
        )

    for name in flags:
        yield Finding.warning(
            SOURCE,
            f"{tally.keys[name].named()} have {name} on messages that are no answers, where it has no effect: "
            "spec.dataset.trainOn decides about these",
        )

    if tally.undeclared:
        rows = next(iter(tally.undeclared.values()))
        yield Finding.warning(
            SOURCE,
            f"calls that the row's tools do not declare: {listed(tally.undeclared)} (the first in {rows.named()}): the "
            "model learns to make them; declare them in the row's tools, or take them out of the calls",
        )
