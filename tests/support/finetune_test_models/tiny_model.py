"""A tiny model with random weights and a tokenizer of its own, made on the spot: nothing is downloaded.

Tests and the demo need a folder that every loader (transformers, the trainer, llama.cpp) takes for a real model. Random
weights are a choice: a tiny trained model collapses to one answer for every prompt, so parity tests on it prove
nothing. The weights are drawn with a standard deviation of 1/sqrt(hidden_size), so that attention and logits have unit
scale. Norms and biases are jittered around their usual constants, so that a wrong conversion of them is seen.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

END_OF_TEXT = "<|endoftext|>"  # padding; also what a plain-text document would end with
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"  # end of sequence: every turn ends with it
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
CONTEXT_LENGTH = 2048

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# transformers rebuilds a Qwen folder's tokenizer with this pattern, whatever tokenizer.json says: train it with that.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gemma(head: int) -> dict[str, Any]:
    return {"tie_word_embeddings": True, "head_dim": head, "query_pre_attn_scalar": head, "sliding_window": 64}


def _gemma4(head: int) -> dict[str, Any]:
    return {"tie_word_embeddings": True, "head_dim": head, "global_head_dim": 2 * head, "sliding_window": 64,
            "hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip


def _experts(head: int) -> dict[str, Any]:
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4 * head}


def _routed(head: int) -> dict[str, Any]:
    return {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4 * head, "n_group": 1,
            "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}  # fmt: skip


def _latent(head: int) -> dict[str, Any]:
    return {"q_lora_rank": 2 * head, "kv_lora_rank": 4 * head, "qk_nope_head_dim": head, "qk_rope_head_dim": head // 2,
            "v_head_dim": head, "num_key_value_heads": 4}  # fmt: skip


def _linear_attention(head: int) -> dict[str, Any]:
    """Twice as many heads of values as of keys, as published."""
    return {"linear_key_head_dim": head, "linear_value_head_dim": head, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "head_dim": head}  # fmt: skip


# Settings of a family's config beyond the common sizes: family -> (model_type, settings by head size).
TINY_FAMILIES: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "llama": ("llama", lambda head: {}),
    "mistral": ("mistral", lambda head: {"sliding_window": None, "head_dim": head}),
    "qwen2": ("qwen2", lambda head: {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", lambda head: {"head_dim": head}),
    "gemma2": ("gemma2", _gemma),
    "gemma3": ("gemma3_text", _gemma),
    "phi3": ("phi3", lambda head: {"sliding_window": None}),
    "ministral3": ("ministral3", lambda head: {"head_dim": head}),
    "smollm3": ("smollm3", lambda head: {}),
    "granite": ("granite", lambda head: {}),
    "arcee": ("arcee", lambda head: {"head_dim": head}),
    "seed_oss": ("seed_oss", lambda head: {"head_dim": head}),
    "olmo2": ("olmo2", lambda head: {}),
    "olmo3": ("olmo3", lambda head: {"sliding_window": 64}),
    "exaone4": ("exaone4", lambda head: {"sliding_window": 64}),
    "ernie4_5": ("ernie4_5", lambda head: {"head_dim": head}),
    "hunyuan": ("hunyuan_v1_dense", lambda head: {"head_dim": head}),
    "glm4": ("glm4", lambda head: {"head_dim": head}),
    "cohere2": ("cohere2", lambda head: {"tie_word_embeddings": True, "head_dim": head, "sliding_window": 64}),
    "starcoder2": ("starcoder2", lambda head: {}),
    "phi": ("phi", lambda head: {}),
    "stablelm": ("stablelm", lambda head: {}),
    "apertus": ("apertus", lambda head: {}),
    "mixtral": ("mixtral", lambda head: {"num_local_experts": 4, "sliding_window": None}),
    "olmoe": ("olmoe", lambda head: {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "qwen2_moe": ("qwen2_moe", lambda head: _experts(head) | {"shared_expert_intermediate_size": 4 * head}),
    "qwen3_moe": ("qwen3_moe", lambda head: _experts(head) | {"head_dim": head, "norm_topk_prob": True}),
    "qwen3_next": (
        "qwen3_next",
        lambda head: _experts(head) | _linear_attention(head) | {"shared_expert_intermediate_size": 4 * head},
    ),
    "qwen3_5": ("qwen3_5_text", _linear_attention),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        lambda head: _experts(head) | _linear_attention(head) | {"shared_expert_intermediate_size": 4 * head},
    ),
    "lfm2": ("lfm2", lambda head: {"block_multiple_of": head}),
    "granitemoe": ("granitemoe", lambda head: {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "gpt_oss",
        lambda head: {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": head, "sliding_window": 64},
    ),
    "llama4": (
        "llama4_text",
        lambda head: {"num_local_experts": 4, "intermediate_size_mlp": 8 * head, "head_dim": head},
    ),
    "glm4_moe": ("glm4_moe", lambda head: _routed(head) | {"head_dim": head}),
    "deepseek_v2": ("deepseek_v2", lambda head: _routed(head) | _latent(head)),
    "deepseek_v3": ("deepseek_v3", lambda head: _routed(head) | _latent(head)),
    "gemma4": ("gemma4_text", _gemma4),
    "gemma": ("gemma", lambda head: {"tie_word_embeddings": True, "head_dim": head}),
}


def make_tiny_model(
    folder: Path,
    *,
    family: str = "llama",
    texts: Iterable[str],
    hidden_size: int = 256,
    vocab_size: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    **config_overrides: Any,
) -> Path:
    """Write a model folder: config, generation config, one safetensors file, tokenizer with a ChatML template.

    `family` is a key of TINY_FAMILIES; `texts` train the byte-level BPE tokenizer (any text can be encoded afterwards).
    `hidden_size` is a multiple of 256, so that rows split into K-quant super-blocks. `config_overrides` go into the
    Hugging Face config as they are; num_hidden_layers is 2 by default. The same arguments give the same bytes. Returns
    `folder`.
    """
    if hidden_size % 256 or family not in TINY_FAMILIES:
        raise ValueError(
            f"hidden_size {hidden_size} must be a multiple of 256 and family {family!r} in {list(TINY_FAMILIES)}"
        )

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size, qwen=family.startswith("qwen"))
    tokenizer.save_pretrained(folder)

    tokens = {
        "vocab_size": vocab_size,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = {"num_hidden_layers": 2} | tokens | config_overrides
    return write_random_weights(folder, family=family, dtype=dtype, hidden_size=hidden_size, **settings)


def tiny_config(family: str, *, hidden_size: int, **settings: Any) -> Any:
    """The Hugging Face config of a key of TINY_FAMILIES; `settings` override its own."""
    model_type, family_settings = TINY_FAMILIES[family]
    heads = 4
    common: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": CONTEXT_LENGTH,
        "initializer_range": 1 / math.sqrt(hidden_size),
        "tie_word_embeddings": False,
    }
    return CONFIG_MAPPING[model_type](**common | family_settings(hidden_size // heads) | settings)


def write_random_weights(
    folder: Path, *, family: str, dtype: torch.dtype = torch.bfloat16, hidden_size: int, **settings: Any
) -> Path:
    """Write config, generation config and weights into `folder`; `settings` are those of the Hugging Face config."""
    config = tiny_config(family, hidden_size=hidden_size, **settings, dtype=dtype)

    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]  # Hugging Face
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name in sorted(dict(model.named_buffers()).keys() & model.state_dict().keys()):
            buffer = model.get_buffer(name)  # biases that choose experts, scales of layers
            buffer.add_(torch.randn_like(buffer), alpha=0.1)

        if family.startswith("gemma"):
            # Gemma multiplies embeddings by sqrt(hidden_size); tied ones would make the model repeat its last token.
            model.get_input_embeddings().weight.div_(math.sqrt(hidden_size))
    model.to(dtype).save_pretrained(folder)
    return folder


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, qwen: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` tokens, with the ChatML template.

    Words are split by GPT-2's pattern, or by Qwen's.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if qwen:
        split = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated")
        bpe.normalizer = normalizers.NFC()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    bpe.decoder = decoders.ByteLevel()

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)

    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # Hugging Face
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=CONTEXT_LENGTH,
        padding_side="right",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
