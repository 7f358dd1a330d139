"""Writes the table of model families anew, from a tiny model of every causal language model type of transformers.

`make architectures` runs it (8 minutes on two cores). With model types as arguments only their rows are written anew.
What it finds is what the trainer finds: each row is asked of the trainer's own functions.
"""

import json
import logging
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from gguf import MODEL_ARCH_NAMES
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from finetune_api.spec.training import DEFAULT_TARGETS
from finetune_kernels.experts.replacing import replace_experts, why_not_replaced
from finetune_kernels.experts.routers import keep_routers_in_fp32
from finetune_kernels.layers.layer_check import why_not_fused
from finetune_kernels.planning.expert_families import expert_family_of_type
from finetune_test_models.minimal_run import minimal_run
from finetune_test_models.sweeps import architecture_sweep, merge_sweep
from finetune_test_models.tiny_architectures import tiny_architecture
from finetune_trainer.export.gguf.families.table import GGUF_FAMILIES
from finetune_trainer.model.architectures import why_no_decoder
from finetune_trainer.model.coverage import Coverage
from finetune_trainer.model.family_table import LANGUAGE_MODEL, TABLE, ModelFamily, family_of_row
from finetune_trainer.model.planned_weights import plan_weights
from finetune_trainer.model.safetensors_header import TensorHeader

WORKERS = 2
DEFAULTS = minimal_run()
"""A job that leaves every choice to the defaults."""
NEAR = 0.01
"""Accepted difference of shares."""


def find_family(model_type: str) -> ModelFamily:
    """Find the row of one type, as the installed transformers and this checkout have it."""
    architecture = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    family = ModelFamily(architecture)
    if reason := why_no_decoder(model_type):
        return replace(family, refused=reason)
    if (text_type := CONFIG_MAPPING[model_type]().get_text_config().model_type) != model_type:
        return replace(family, refused=f"{LANGUAGE_MODEL}{text_type}")

    try:
        answer = architecture_sweep.ask(model_type)
    except Exception as error:  # noqa: BLE001  # every architecture may fail in a way of its own
        return replace(family, refused=f"the first step of a small model fails ({_first_line(error)})")

    if not answer.is_right:
        return replace(family, refused=f"the first step of a small model fails ({answer.remark.strip()})")

    model = tiny_architecture(model_type)
    coverage = default_coverage(model_type)
    row = GGUF_FAMILIES.get(model_type)
    return replace(
        family,
        batching=answer.batching,
        not_packed=_without_figures(answer.remark),
        not_fused=_not_fused(model),
        adapted=None if coverage is None else round(coverage.adapted_share, 3),
        quantized=None if coverage is None else round(coverage.quantized_share, 3),
        not_merged=_not_merged(model_type),
        gguf=None if row is None else MODEL_ARCH_NAMES[row.architecture],
    )


def default_coverage(model_type: str) -> Coverage | None:
    """Measure the shares of adapters and NF4 in a model of its default sizes; None: it has no default targets."""
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type]())  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001  # some configurations have no defaults that make a model
        print(f"{model_type}: shares are those of a tiny model: {_first_line(error)}", file=sys.stderr)
        model = tiny_architecture(model_type)
    stored = [each for name, weights in model.named_parameters() for each in _as_stored(name, weights, model_type)]
    headers = [TensorHeader(name, "BF16", shape, "", 0, 2 * prod(shape)) for name, shape in stored]
    planned = plan_weights(headers, DEFAULTS, model_type, chosen=0)
    return None if planned is None else planned.coverage


def _as_stored(name: str, weights: torch.Tensor, model_type: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a parameter in files: of experts without a gate, a matrix for each."""
    family, (experts, _, leaf) = expert_family_of_type(model_type), name.rpartition(".")
    if weights.ndim == 3 and family is not None and not family.is_gated and leaf in family.weights:
        return [(f"{experts}.{number}.{leaf}.weight", tuple(weights.shape[1:])) for number in range(len(weights))]
    return [(name, tuple(weights.shape))]


def _not_fused(model: Any) -> str | None:
    model.requires_grad_(False)
    if why_not_replaced(model) is None:
        replace_experts(model)
        keep_routers_in_fp32(model)
    return why_not_fused(model)


def _not_merged(model_type: str) -> str | None:
    with tempfile.TemporaryDirectory() as made:
        if not merge_sweep.write_model(model_type, Path(made)):
            return None
        answer = merge_sweep.ask(model_type, Path(made), DEFAULT_TARGETS)
    return "it has none of the default layers" if answer is None else answer.trainer


def _without_figures(remark: str) -> str | None:
    """A reason without the figures of one machine, which stand in brackets."""
    return " ".join(remark.split(" (")[0].split()) or None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def differences(written: ModelFamily, found: ModelFamily) -> list[str]:
    """List the fields of a row of the table that are out of date."""
    wrong = []
    for name, value in asdict(found).items():
        before = getattr(written, name)
        near = isinstance(value, float) and isinstance(before, float) and abs(value - before) < NEAR
        if value != before and not near:
            wrong.append(f"{name}: {before} is {value} now")
    return wrong


def write(families: dict[str, ModelFamily]) -> None:
    """Write the table; fields that say nothing are left out."""
    rows = {
        name: {key: value for key, value in asdict(family).items() if value is not None}
        for name, family in sorted(families.items())
    }
    TABLE.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Write the rows of the given types, or of all, and print what changed."""
    known = {name: family_of_row(row) for name, row in json.loads(TABLE.read_text()).items()}
    every = architecture_sweep.types()
    asked = sys.argv[1:] or every
    families = {name: known[name] for name in known if name in every}

    with ProcessPoolExecutor(WORKERS, get_context("spawn"), initializer=be_quiet) as workers:
        for name, family in zip(asked, workers.map(find_family, asked), strict=True):
            families[name] = family
            changed = differences(known[name], family) if name in known else ["new"]
            print(f"{name:<26} {'; '.join(changed) or 'as before'}", flush=True)
            write(families)

    trained = [family for family in families.values() if family.refused is None]
    fused = sum(family.not_fused is None for family in trained)
    exported = sum(family.gguf is not None for family in trained)
    print(f"{len(families)} types: {len(trained)} train, {fused} fused, {exported} become GGUF")


def be_quiet() -> None:
    """Keep to one core, and say nothing of what small models lack."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    set_verbosity_error()  # type: ignore[no-untyped-call]
    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
