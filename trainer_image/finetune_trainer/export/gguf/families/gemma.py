"""Rows of the Gemma families: norms that multiply by 1 + weight, and windows in some layers."""

from typing import Any

from gguf import MODEL_ARCH

from finetune_trainer.export.gguf.families.common import TANH_GELU
from finetune_trainer.export.gguf.family_row import GgufFamily

_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "activation": TANH_GELU}
GEMMA: dict[str, GgufFamily] = {
    "gemma": GgufFamily(MODEL_ARCH.GEMMA, fixed={"tie_word_embeddings": True}, **_GEMMA),
    "gemma2": GgufFamily(MODEL_ARCH.GEMMA2, sliding_window=True, fixed_scale_layers=46, window_period=2, **_GEMMA),
    "gemma3_text": GgufFamily(MODEL_ARCH.GEMMA3, sliding_window=True, fixed_scale_layers=62, window_period=6, **_GEMMA),
    "gemma3n_text": GgufFamily(
        MODEL_ARCH.GEMMA3N,
        activation=TANH_GELU,
        window_pattern=True,
        window_period=5,
        sparse_layers=10,
        own_kv_layers=20,
        changes={".embed_tokens_per_layer.weight": ("all_rows",)},
        settings={
            "altup_active_idx": "altup_active_idx",
            "altup_num_inputs": "altup_num_inputs",
            "hidden_size_per_layer_input": "embedding_length_per_layer_input",
            "num_kv_shared_layers": "shared_kv_layers",
        },
        fixed={
            "altup_active_idx": 0,
            "altup_num_inputs": 4,
            "altup_correct_scale": True,
            "hidden_size_per_layer_input": 256,
            "laurel_rank": 64,
            "final_logit_softcapping": 30.0,
            "attention_bias": False,
        },
    ),
    "gemma4_text": GgufFamily(
        MODEL_ARCH.GEMMA4,
        activation=TANH_GELU,
        window_pattern=True,
        rope_tensors=True,
        layer_sizes=True,
        tokenizer="gemma4",
        settings={"moe_intermediate_size": "expert_feed_forward_length"},
        fixed={"attention_bias": False},
    ),
}
