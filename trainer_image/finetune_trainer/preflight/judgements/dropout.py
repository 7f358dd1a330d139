"""Judges dropout in the base model's own configuration, which a run switches off. Pure."""

from collections.abc import Iterator, Mapping

from finetune_trainer.model.configuration.dropout import describe_dropout
from finetune_trainer.preflight.report import Finding

SOURCE = "spec.model.source"


def judge_dropout(rates: Mapping[str, float], adapters: float) -> Iterator[Finding]:
    """A warning with the rates of the base, if any; `adapters`: the rate of the job's own adapters."""
    if (switched_off := describe_dropout(rates)) is None:
        return

    instead = (
        f"the adapters keep the {adapters:g} of spec.adapter.dropout"
        if adapters
        else "to have the adapters drop a part of their inputs, write spec.adapter.dropout"
    )
    yield Finding.warning(SOURCE, f"{switched_off}: its weights do not train; {instead}")
