"""A tiny model with random weights and a tokenizer of its own, made on the spot: nothing is downloaded.

Tests and the demo need a folder that every loader (transformers, the trainer, llama.cpp) takes for a real model. Random
weights are a choice: a tiny trained model collapses to one answer for every prompt, so parity tests on it prove
nothing. The weights are drawn with a standard deviation of 1/sqrt(hidden_size), so that attention and logits have unit
scale. Norms and biases are jittered around their usual constants, so that a wrong conversion of them is seen.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_test_models.tiny_families.settings import TINY_FAMILIES

END_OF_TEXT = "<|endoftext|>"  # padding; also what a plain-text document would end with
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"  # end of sequence: every turn ends with it
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
CONTEXT_LENGTH = 2048
CALM = 0.5

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
    folder: Path, *, family: str, dtype: torch.dtype = torch.bfloat16, hidden_size: int, seed: int = 0, **settings: Any
) -> Path:
    """Write config, generation config and weights into `folder`; `settings` are those of the Hugging Face config."""
    config = tiny_config(family, hidden_size=hidden_size, **settings, dtype=dtype)

    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]  # Hugging Face
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_row = name.endswith("bias") and parameter.shape[0] == 1  # Ernie 4.5's, which chooses experts
            if parameter.dim() == 1 or is_row:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name in sorted(dict(model.named_buffers()).keys() & model.state_dict().keys()):
            buffer = model.get_buffer(name)  # biases that choose experts, scales of layers
            buffer.add_(torch.randn_like(buffer), alpha=0.1)

        if family.startswith("gemma"):
            # Gemma multiplies embeddings by sqrt(hidden_size); tied ones would make the model repeat its last token.
            model.get_input_embeddings().weight.div_(math.sqrt(hidden_size))
        adapt_norms(model, family)
    model.to(dtype).save_pretrained(folder, state_dict=published_weights(model, family))
    return folder


def adapt_norms(model: Any, family: str) -> None:
    """Give norms the size that published ones have, where transformers begins with another.

    Nemotron multiplies by 1 + weight. Gemma 3n's attention has the scale 1, which is in the norm of queries, and each
    of its 25 layers adds little, so that rounding does not grow from layer to layer.
    """
    for name, weight in model.named_parameters():
        if family == "nemotron" and name.endswith("norm.weight"):
            weight.sub_(1)
        if family == "gemma3n" and name.endswith("q_norm.weight"):
            weight.mul_(1 / math.sqrt(model.config.head_dim))
        if family == "gemma3n" and ".post_" in name:
            weight.mul_(CALM)


def published_weights(model: Any, family: str) -> dict[str, torch.Tensor]:
    """The weights of a model by name, with those that published files have and transformers does not load: keys and
    values of Gemma 3n's layers that read others'."""
    weights: dict[str, torch.Tensor] = model.state_dict()
    if family != "gemma3n":
        return weights

    layers = model.config.num_hidden_layers
    for layer in range(layers - model.config.num_kv_shared_layers, layers):
        for part in ("k_proj", "v_proj", "k_norm"):
            weight = weights[f"model.layers.0.self_attn.{part}.weight"]
            weights[f"model.layers.{layer}.self_attn.{part}.weight"] = weight.flip(0).contiguous()
    return weights


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
