"""The model card: what the model is, what it was made of, and the commands that use it.

The text is the template model_card.md.jinja; this module computes what it shows. The front matter is huggingface_hub's,
so that the Hub lists a pushed repository under its base model. Text from outside (names, sources) goes through YAML or
into code spans, where Markdown has no meaning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from finetune_api.run_config import RunConfig
from finetune_api.spec.sources import Source
from finetune_trainer.documents.course import Course
from finetune_trainer.documents.public_settings import changed_settings, public_source
from finetune_trainer.documents.sample_table import sample_table
from finetune_trainer.model.published_weights import PublishedWeights
from finetune_trainer.storage.sizes import GIBIBYTE
from finetune_trainer.training.records import SampleLine

PLOT_NAME = "loss.svg"
TEMPLATE_NAME = "model_card.md.jinja"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank."""


@dataclass(frozen=True)
class CardFacts:
    """Content of the card."""

    config: RunConfig
    description: Mapping[str, Any]
    """Result of `describe_run`."""
    has_merged: bool
    gguf: Sequence[str]
    """Names of the GGUF files."""
    has_plot: bool
    best_step: int | None = None
    """Step whose adapter is exported, if it is the one with the lowest evaluation loss."""
    samples: Sequence[SampleLine] = ()
    is_dequantised: bool = False
    """True if the base's weights exist in NF4 only."""
    published: PublishedWeights | None = None
    """The base's weights as they are published; None if that is not known."""
    base_dropout: str | None = None
    """Says which dropout of the base was switched off; None if it has none."""
    judged: Sequence[str] = ()
    """Lines of the table of judged losses."""
    warnings: Sequence[str] = ()
    """Published weights that lost part of the training."""
    failed_exports: Sequence[str] = ()
    """What the job asked for and could not be made."""
    course: Course | None = None
    """None if no step was logged."""


def write_model_card(facts: CardFacts) -> str:
    """Returns the README.md of the model."""
    body = _environment().from_string(_template()).render(_values(facts))
    return str(ModelCard(f"---\n{_front_matter(facts).to_yaml()}\n---\n\n{body}"))


def _front_matter(facts: CardFacts) -> ModelCardData:
    config = facts.config
    base, data = (Source.parse(each.source).hub_name for each in (config.model, config.dataset))

    return ModelCardData(
        base_model=base,
        base_model_relation=("finetune" if facts.has_merged else "adapter") if base else None,
        datasets=[data] if data else None,
        library_name="transformers" if facts.has_merged else "peft",
        pipeline_tag="text-generation",
        tags=["finetune-operator", "lora", "sft", *(["gguf"] if facts.gguf else [])],
    )


def _values(facts: CardFacts) -> dict[str, Any]:
    """Returns the template's variables."""
    config, description = facts.config, facts.description
    hub = config.output.hub
    text = yaml.safe_dump(changed_settings(config), sort_keys=False, allow_unicode=True).rstrip()

    return {
        "job": config.job.name,
        "config": config,
        "model_source": public_source(config.model.source),
        "dataset_source": public_source(config.dataset.source),
        "resolved": description["resolved"],
        "course": facts.course,
        "hardware": description["versions"].get("gpu", "a CPU"),
        "metrics": description["metrics"],
        "memory": description.get("memory"),
        "best_step": facts.best_step,
        "is_dequantised": facts.is_dequantised,
        **_of_published(facts.published, has_merged=facts.has_merged),
        "base_dropout": facts.base_dropout,
        "judged": facts.judged,
        "warnings": facts.warnings,
        "plot": PLOT_NAME if facts.has_plot else None,
        "samples": sample_table(facts.samples, facts.best_step) if facts.samples else (),
        "repository": hub.repository if hub else None,
        "base": Source.parse(config.model.source).hub_name or "BASE_MODEL_FOLDER",
        "failed_exports": facts.failed_exports,
        "vllm_rank": _vllm_rank(config.adapter.rank),
        "has_merged": facts.has_merged,
        "gguf": [_gguf_names(file, config.job.name) for file in facts.gguf],
        "configuration": text,
        "fence": _fence(text),
    }


def _of_published(published: PublishedWeights | None, *, has_merged: bool) -> dict[str, Any]:
    """Returns the template's variables about what is copied and decoded of the base."""
    is_multimodal = published is not None and published.reads is not None
    return {
        "published_weights": published.sentence() if published is not None else None,
        "copied": is_multimodal and has_merged,
        "auto_class": "AutoModelForImageTextToText" if is_multimodal else "AutoModelForCausalLM",
    }


def _gguf_names(file: str, job: str) -> dict[str, str]:
    """Returns the names that commands need for a GGUF file called <job>-<quantization>.gguf."""
    stem = file.removesuffix(".gguf")
    return {"name": file, "modelfile": f"{stem}.Modelfile", "quantization": stem.removeprefix(f"{job}-")}


def _vllm_rank(rank: int) -> int:
    """Returns the smallest limit that vLLM accepts and that is not below the rank."""
    return next((limit for limit in VLLM_RANKS if limit >= rank), rank)


def _fence(text: str) -> str:
    """Returns a code fence longer than any in the text: a chat template may hold anything."""
    fence = "```"
    while fence in text:
        fence += "`"
    return fence


def _environment() -> Environment:
    """Returns jinja2's settings: Markdown is not escaped as HTML, and a name that is missing is an error."""
    environment = Environment(  # noqa: S701 (the result is Markdown; names from outside go into code spans)
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters |= {"code": _code, "gib": lambda count: f"{count / GIBIBYTE:.2f} GiB"}
    return environment


def _template() -> str:
    return files(__package__).joinpath(TEMPLATE_NAME).read_text(encoding="utf-8")


def _code(text: str) -> str:
    """Returns a code span; a backquote in it would end it, and is written as %60."""
    return f"`{text.replace('`', '%60')}`"
