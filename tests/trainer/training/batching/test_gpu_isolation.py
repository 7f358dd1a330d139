"""On a GPU, with our kernels or without: known families and hybrids are packed, and runs of gpt-oss are padded.

    python -m pytest tests/trainer/training/batching/test_gpu_isolation.py -o log_cli=true -o log_cli_level=INFO

also shows the differences of logits that were measured.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from finetune_api.vocabulary import Batching
from finetune_test_models import gpu_runs, tiny_runs
from finetune_test_models.tiny_architectures import tiny_architecture

pytestmark = pytest.mark.gpu
texts, tiny_base, chat_file, run_config = (
    tiny_runs.texts, tiny_runs.tiny_base, tiny_runs.chat_file, tiny_runs.run_config,
)  # fmt: skip
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "moe_intermediate_size": 256, "initializer_range": 1 / 16,
}  # fmt: skip
TYPES = {"granite 4 h, dense": "granitemoehybrid"}
OWN: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"mamba_d_head": 64},
    "granite 4 h, dense": {"mamba_d_head": 64, "num_local_experts": 0, "shared_intermediate_size": 512},
}
CASES = {
    "llama": Batching.PACKED,
    "mistral": Batching.PACKED,
    "qwen2": Batching.PACKED,
    "qwen3": Batching.PACKED,
    "phi3": Batching.PACKED,
    "gemma2": Batching.PACKED,
    "gemma3_text": Batching.PACKED,
    "gemma4_text": Batching.PACKED,
    "qwen3_moe": Batching.PACKED,
    "olmo2": Batching.PACKED,
    "gpt_oss": Batching.PACKED,
    "qwen3_5_text": Batching.PACKED,
    "lfm2": Batching.PACKED,
    "granitemoehybrid": Batching.PACKED,
    "granite 4 h, dense": Batching.PACKED,
    "falcon_h1": Batching.PACKED,
    "nemotron_h": Batching.PACKED,
}


@pytest.mark.filterwarnings("ignore")  # families warn of kernels that are not installed
@pytest.mark.parametrize("changes", [{}, {"memory": "Smallest"}], ids=["kernels", "smallest memory"])
@pytest.mark.parametrize("model_type", CASES)
def test_a_run_keeps_documents_apart_as_the_cpu_does(
    run_config: tiny_runs.Builder, tiny_base: Path, tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (*tiny_base.glob("*token*"), *tiny_base.glob("*.jinja")):
        shutil.copy(path, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = tiny_architecture(
        TYPES.get(model_type, model_type), vocab_size=len(tokenizer), **SIZES | ends | OWN.get(model_type, {})
    )
    model.to(torch.bfloat16).save_pretrained(folder)

    config = run_config(
        model={"source": f"file://{folder}"},
        adapter={"targetModules": ["all-linear"]},
        training={"batchSize": 2, "gradientAccumulation": 2, "precision": "BF16", **changes},
    )
    _, reported = gpu_runs.run(config, tmp_path)
    assert reported.resolved is not None
    assert reported.resolved.batching is CASES[model_type], reported.resolved.batching_reason
