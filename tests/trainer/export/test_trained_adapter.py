"""The last link of the chain: what the engine's own layers answer after training is what the exported files answer.

Around it: merged weights are peft's own, rounded once (test_export.py); F32 files of every family say what transformers
says (gguf/test_llama_cpp.py); whole runs, on a GPU too, end with an adapter and merged weights that agree
(tests/trainer/test_whole_run.py).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Precision
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_test_models import tiny_runs
from finetune_test_programs.generation import complete
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.saving import save_artifacts
from finetune_trainer.training.collator import collate_packed
from finetune_trainer.training.engine import prepare_engine
from finetune_trainer.training.loaded_model import LoadedModel

texts, tiny_base, chat_file = tiny_runs.texts, tiny_runs.tiny_base, tiny_runs.chat_file
run_config = tiny_runs.run_config
PROMPTS = [[20, 31, 42, 53], [400, 17, 90, 211, 64]]
TOKENS = 4


def trained_by_kernels(base: Path, config: RunConfig) -> tuple[Any, LoadedModel]:
    """A few steps with whole layers as one function each: in the interpreter on a CPU, as jobs have it on a GPU."""
    # Auto is bfloat16 on CPUs that compute it fast; the layers below are made for float32.
    precision = Precision.FP32 if config.gpus == 0 else Precision.AUTO
    loaded = load_model(base, config.model, precision, gpus=config.gpus)
    model = inject_adapter(loaded.model, config.adapter, 1).model
    engine = prepare_engine(model, loaded, config)
    if config.gpus == 0:
        FusedLayers(
            model.get_base_model(),
            [ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_ALL],
            torch.float32,
            keep_dequantized=True,
        )
    else:
        assert engine.layers is not None
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    row = list(range(5, 29))
    made = collate_packed([{"input_ids": row, "labels": row}]).items()
    batch = {name: value.to(loaded.device) if isinstance(value, torch.Tensor) else value for name, value in made}
    labels, supervised = batch.pop("labels"), batch.pop("supervised")

    losses = []
    for _ in range(4):
        loss = engine.loss(model, batch, labels, supervised, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    return model.eval(), loaded


@torch.no_grad()
def logits(model: Any, prompt: list[int]) -> torch.Tensor:
    result: torch.Tensor = model(torch.tensor([prompt], device=model.device), use_cache=False).logits[0].float().cpu()
    return result


def continued(model: Any, prompt: list[int], banned: list[int]) -> list[int]:
    answer: list[int] = []
    for _ in range(TOKENS):
        last = logits(model, prompt + answer)[-1]
        last[banned] = -torch.inf
        answer.append(int(last.argmax()))
    return answer


@pytest.mark.parametrize("gpus", [0, pytest.param(1, marks=pytest.mark.gpu)])
def test_exported_files_answer_what_the_engines_layers_answer(
    run_config: tiny_runs.Builder, tiny_base: Path, tmp_path: Path, gpus: int
) -> None:
    config = run_config(model={"quantization": "None"}, export={"merged": "BF16"}).model_copy(update={"gpus": gpus})
    model, loaded = trained_by_kernels(tiny_base, config)
    saved = save_artifacts(model, loaded, tiny_base, config, tmp_path)
    adapter, merged = (artifact.path for artifact in saved.artifacts)
    found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    unchanged = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for prompt in PROMPTS:
        expected = logits(model, prompt)
        effect = (logits(unchanged, prompt) - expected).abs().max()
        assert (logits(found, prompt) - expected).abs().max() < 0.1 * effect

    if gpus == 0:  # in bfloat16 near ties would decide otherwise
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        broken = {token for token in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([token])}
        banned = sorted(broken | set(tokenizer.all_special_ids))
        request = ExportRequest(
            base=tiny_base, adapter=adapter, output=tmp_path, merged=None, gguf=("F32",), name="trained"
        )
        (file,) = export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
        answers = [continued(model, prompt, banned) for prompt in PROMPTS]
        assert complete(file.path, PROMPTS, tokens=TOKENS, banned=banned) == answers
        assert answers != [continued(unchanged, prompt, banned) for prompt in PROMPTS]
