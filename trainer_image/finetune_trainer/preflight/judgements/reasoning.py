"""Judges the reasoning of answers: what the template leaves out is never learned, what it doubles is learned so."""

from collections.abc import Iterator

from finetune_trainer.chat.sandbox.reasoning import Fate
from finetune_trainer.preflight.report import Finding
from finetune_trainer.preflight.tallies.reasoning import ReasoningTally

CHAT_TEMPLATE = "spec.model.chatTemplate"
ALL_LEFT_OUT = "to train on it, set spec.model.chatTemplate to a template that prints it, else take it out of the rows"
SOME_LEFT_OUT = (
    "it prints that of the other {others}, as a rule the answers behind a conversation's last question: to train on "
    "all, end a row behind each answer with reasoning, or set spec.model.chatTemplate to a template that prints it"
)
DOUBLED = (
    "which the model would learn to repeat: write it once, in content or in reasoning_content, and in content without "
    "the tags that the template writes itself"
)


def judge_reasoning(tally: ReasoningTally) -> Iterator[Finding]:
    """Warnings about reasoning that the chat template leaves out, or prints twice."""
    if (lost := tally.fates[Fate.LEFT_OUT]).rows:
        others = tally.answers - lost.items
        remedy = SOME_LEFT_OUT.format(others=others) if others else ALL_LEFT_OUT
        yield Finding.warning(
            CHAT_TEMPLATE,
            f"the chat template leaves out the reasoning of {lost.items} of {tally.answers} answers that have some, in "
            f"{lost.named()} of {tally.rows} encoded: the model learns to answer without it; {remedy}",
        )

    if (doubled := tally.fates[Fate.DOUBLED]).rows:
        yield Finding.warning(
            CHAT_TEMPLATE,
            f"the chat template prints the reasoning of {doubled.items} answers, or the tag in front of it, twice, in "
            f"{doubled.named()} of {tally.rows} encoded, {DOUBLED}",
        )
