"""The model card: what this is, what it was made of, and the commands that use it.

Its header is huggingface_hub's, so that the Hub files a pushed repository under its base model. Text from outside
(names, sources) goes through YAML or into code spans, where Markdown means nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from finetune_api.run_config import RunConfig
from finetune_api.spec.sources import Source
from finetune_trainer.documents.sample_table import sample_table
from finetune_trainer.training.records import SampleLine

PLOT_NAME = "loss.svg"
GIBIBYTE = 1 << 30
DECODED = (
    "The base exists in NF4 only: merged weights and GGUF files hold its decoded weights, with the error of that "
    "quantisation"
)


@dataclass(frozen=True)
class CardFacts:
    """What the card says."""

    config: RunConfig
    description: Mapping[str, Any]
    """What `describe_run` says."""
    has_merged: bool
    gguf: Sequence[str]
    """Names of the GGUF files."""
    has_plot: bool
    best_step: int | None = None
    """Step whose adapter is exported, where that is the best one."""
    samples: Sequence[SampleLine] = ()
    is_decoded: bool = False
    """Whether the base's weights exist in NF4 only."""


def write_model_card(facts: CardFacts) -> str:
    """README.md of the model."""
    samples = sample_table(facts.samples, facts.best_step) if facts.samples else ()
    body = "\n".join(
        (*_about(facts), *_results(facts), *samples, *_commands(facts), *_configuration(facts.description))
    )
    return str(ModelCard(f"---\n{_header(facts).to_yaml()}\n---\n\n{body}\n"))


def _header(facts: CardFacts) -> ModelCardData:
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


def _about(facts: CardFacts) -> Sequence[str]:
    config, resolved = facts.config, facts.description["resolved"]
    revision = f" at `{resolved['modelRevision']}`" if "modelRevision" in resolved else ""
    rows = f"{resolved['rows']:,} rows, " if "rows" in resolved else ""
    return (
        f"# {config.job.name}",
        "",
        (
            f"{config.adapter.variant} fine-tuning of {_code(config.model.source)}{revision} "
            f"(SHA-256 `{resolved['modelDigest']}`)."
        ),
        "",
        f"Data: {_code(config.dataset.source)}, {rows}SHA-256 `{resolved['datasetDigest']}`.",
        "",
        *_decoded(facts),
    )


def _decoded(facts: CardFacts) -> Sequence[str]:
    if not (facts.is_decoded and (facts.has_merged or facts.gguf)):
        return ()
    return (f"{DECODED}.", "")


def _results(facts: CardFacts) -> Sequence[str]:
    metrics = facts.description["metrics"]
    rows = [f"| {name} | {value:g} |" for name, value in metrics.items()]
    plot = [f"![Loss by step]({PLOT_NAME})", ""] if facts.has_plot else []
    early = ", after which training stopped early" if metrics.get("stoppedEarly") else ""
    best = [f"Exported is step {facts.best_step}, with the lowest evaluation loss{early}.", ""]
    return (
        "## Results",
        "",
        "| metric | value |",
        "|---|---|",
        *rows,
        "",
        "Losses are nats per supervised token.",
        "",
        *(best if facts.best_step is not None else []),
        *_memory(facts.description.get("memory")),
        *plot,
    )


def _memory(memory: Mapping[str, Any] | None) -> Sequence[str]:
    """What the memory plan said, and what came."""
    if memory is None:
        return ()
    peaks = [f"{memory['predictedPeakBytes'] / GIBIBYTE:.2f} GiB predicted"]
    if "measuredPeakBytes" in memory:
        peaks.append(f"{memory['measuredPeakBytes'] / GIBIBYTE:.2f} GiB measured")
    fallbacks = [f"after step {each['step']} to {each['toMode']}" for each in memory["fallbacks"]]
    less = f"; memory ran out {' and '.join(fallbacks)}" if fallbacks else ""
    return (f"GPU memory: plan {memory['mode']}, peak {', '.join(peaks)}{less}.", "")


def _commands(facts: CardFacts) -> Sequence[str]:
    name, rank = facts.config.job.name, facts.config.adapter.rank
    base = Source.parse(facts.config.model.source).hub_name or "BASE_MODEL_FOLDER"
    lines = ["## Use", "", *_hub_commands(facts)]
    lines += ["From the folder that `finetune artifacts JOB --download FOLDER` fills:", "", "```sh"]
    lines += [
        "# vLLM, adapter on its base",
        f"vllm serve {base} --enable-lora --max-lora-rank {_vllm_rank(rank)} --lora-modules {name}=./adapter",
    ]
    if facts.has_merged:
        lines += ["# vLLM, merged weights", f"vllm serve ./merged --served-model-name {name}"]
    for file in facts.gguf:
        modelfile = file.removesuffix(".gguf") + ".Modelfile"
        lines += [
            f"# {file}: llama.cpp, Ollama",
            f"llama-cli -m gguf/{file} -cnv",
            f"llama-server -m gguf/{file}",
            f"ollama create {name} -f gguf/{modelfile} && ollama run {name}",
        ]
    return (*lines, "```", "")


def _hub_commands(facts: CardFacts) -> Sequence[str]:
    """Commands for the repository that the job pushes to; merged weights and GGUF files lie at its top."""
    hub = facts.config.output.hub
    if hub is None:
        return ()
    lines = [f"vllm serve {hub.repository}"] if facts.has_merged else []
    for file in facts.gguf:
        kind = file.removesuffix(".gguf").removeprefix(f"{facts.config.job.name}-")
        lines += [f"llama-server -hf {hub.repository}:{kind}", f"ollama run hf.co/{hub.repository}:{kind}"]
    return ("From the Hugging Face Hub:", "", "```sh", *lines, "```", "") if lines else ()


def _configuration(description: Mapping[str, Any]) -> Sequence[str]:
    text = yaml.safe_dump(dict(description), sort_keys=False, allow_unicode=True).rstrip()
    fence = "```"
    while fence in text:  # a chat template may hold anything
        fence += "`"
    return ("## Resolved configuration", "", f"{fence}yaml", text, fence)


def _vllm_rank(rank: int) -> int:
    """The smallest limit that vLLM accepts and that holds the rank."""
    return next((limit for limit in (8, 16, 32, 64, 128, 256, 320, 512) if limit >= rank), rank)


def _code(text: str) -> str:
    """A code span; a backquote would end it."""
    return f"`{text.replace('`', '%60')}`"
