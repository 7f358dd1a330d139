"""`finetune init`: asks for what a job cannot do without, and writes a commented manifest that is valid."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.prompt import FloatPrompt, Prompt

from finetune_api.base import FieldPath
from finetune_trainer.cli.manifest.options import Change, option_of
from finetune_trainer.cli.manifest.read import GPUS, InvalidManifestError, read_job

INVALID = 10  # ExitCode.CONFIGURATION
MODEL: FieldPath = ("spec", "model", "source")
DATA: FieldPath = ("spec", "dataset", "source")
EVALUATION: FieldPath = ("spec", "dataset", "evaluation", "fraction")
BUCKET: FieldPath = ("spec", "output", "s3", "bucket")

TEMPLATE = """\
# A fine-tuning job. Check it:   finetune validate {file}{output}
# Train on this machine:         finetune run {file} --output results
# Train on a cluster:            kubectl apply -f {file}
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata:
  name: {name}
spec:
  model:
    source: {model}  # hf://org/name, s3://bucket/prefix/ or pvc://claim/path; here also a folder
    maxSequenceLength: {length}  # tokens of a row; longer rows are truncated
    quantization: {quantization}  # frozen weights in 4 bits (NF4), or None for 16
    # chatTemplateName: ChatML  # where the tokenizer has no chat template of its own
  dataset:
    source: {data}  # JSON Lines, JSON, CSV or Parquet; rows such as {{"messages": [{{"role", "content"}}]}}
    {evaluation}  # share of the rows held out to measure the loss on
  adapter:
    rank: {rank}  # 8 to 64; higher learns more and needs more memory
  training:
    {duration}
    learningRate: {rate}  # usual for LoRA: 1e-4 to 5e-4
    # batchSize: 2  # default: chosen by the memory plan
    gradientAccumulation: {accumulation}  # a step has batchSize x gradientAccumulation rows
  export:
    merged: {merged}  # adapter and base as one model: BF16, FP16 or None
    gguf: {gguf}  # for llama.cpp and Ollama; Q4_K_M is smaller
  {bucket}  # a cluster writes here; `finetune run --output DIR` needs no bucket
  resources:
    gpus: {gpus}  # 0 trains on the CPU: tiny models only
"""


def write_starter(options: argparse.Namespace, console: Console) -> int:
    """Writes the manifest; returns the exit code."""
    path: Path = options.manifest
    if path.exists() and not options.force:
        console.print(f"{path} exists: choose another name, or give --force to replace it", markup=False)
        return INVALID

    changes = _ask(options.changes, console)
    missing = [name for name, field in (("--model", MODEL), ("--data", DATA)) if option_of(field, changes) is None]
    if missing:
        console.print(f"{' and '.join(missing)}: needed where nobody can be asked", markup=False)
        return INVALID
    if options.bucket is not None:
        changes.append(Change("--bucket", BUCKET, options.bucket))

    try:
        text = render_starter(changes, path)
    except InvalidManifestError as error:
        for line in error.errors:
            console.print(line, markup=False, soft_wrap=True)
        return INVALID

    path.write_text(text, encoding="utf-8")
    output = "" if options.bucket else " --output results"
    for line in (f"{path} is written. Next:", f"  finetune validate {path}{output}", f"  finetune run {path}{output}"):
        console.print(line, markup=False, soft_wrap=True)
    return 0


def render_starter(changes: Sequence[Change], path: Path) -> str:
    """Returns the commented manifest of the job that the options describe. Raises InvalidManifestError."""
    job = read_job(None, changes, needs_bucket=False).job
    spec, bucket = job.spec, job.spec.output.s3.bucket
    fraction = spec.dataset.evaluation.fraction if spec.dataset.evaluation else None
    steps, epochs = spec.training.max_steps, spec.training.epochs or 1
    is_for_cluster = bucket is not None and option_of(GPUS, changes) is None

    return TEMPLATE.format(
        file=path,
        output="" if bucket else " --output results",
        name=_scalar(job.metadata.name),
        model=_scalar(_written(MODEL, spec.model.source, changes)),
        data=_scalar(_written(DATA, spec.dataset.source, changes)),
        length=spec.model.max_sequence_length,
        quantization=spec.model.quantization,
        evaluation=("" if fraction else "# ") + f"evaluation: {{fraction: {fraction or 0.05:g}}}",
        rank=spec.adapter.rank,
        duration=f"maxSteps: {steps}  # or epochs" if steps else f"epochs: {epochs:g}  # or maxSteps",
        rate=f"{spec.training.learning_rate:g}",
        accumulation=spec.training.gradient_accumulation,
        merged=spec.export.merged,
        gguf=f"[{', '.join(spec.export.gguf)}]",
        bucket=f"output: {{s3: {{bucket: {bucket}}}}}" if bucket else "# output: {s3: {bucket: my-models}}",
        gpus=1 if is_for_cluster else spec.resources.gpus,
    )


def _ask(changes: Sequence[Change], console: Console) -> list[Change]:
    """The options, and answers for what they leave out; nothing is asked where nobody can answer."""
    found = list(changes)
    if not sys.stdin.isatty():
        return found

    questions = (
        ("--model", MODEL, "Base model (org/name on the Hub, or a folder)"),
        ("--data", DATA, "Training data (a file, or org/name on the Hub)"),
    )
    for option, field, question in questions:
        if option_of(field, found) is None:
            found.append(Change(option, field, Prompt.ask(question, console=console)))

    if option_of(EVALUATION, found) is None:
        question = "Share of the rows to hold out for evaluation (0: none)"
        if share := FloatPrompt.ask(question, console=console, default=0.05):
            found.append(Change("--eval", EVALUATION, share))
    return found


def _written(field: FieldPath, uri: str, changes: Sequence[Change]) -> str:
    """A source for the manifest: paths as they were given, and names on the Hub as URIs, which a cluster takes too."""
    given = option_of(field, changes)
    return str(given.value) if given is not None and uri.startswith("file://") else uri


def _scalar(text: Any) -> str:
    """A text as YAML, with quotes where it needs them."""
    return str(yaml.safe_dump(text, width=10_000)).removesuffix("\n").removesuffix("...").strip()
