"""Makes small base models of families other than Gemma: random weights, trained in full on real conversations.

Plain PyTorch and transformers train them, none of our code: what is measured later is no part of what it starts from.
The weights are saved in bfloat16, as those of published models are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from held_out.conversations import Conversation

SEED = 3407
END, PAD = "<|im_end|>", "<|endoftext|>"
SPECIAL = [PAD, "<|im_start|>", END]
TOKENIZER_TEXTS = 500
WARMUP = 0.05
"""Part of the steps."""


@dataclass(frozen=True)
class Reading:
    """Length and pace of the training from random weights."""

    steps: int = 500
    rows: int = 64
    length: int = 256
    """Tokens of a row, which begins anywhere."""
    vocabulary: int = 8192
    learning_rate: float = 1e-3


CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    "qwen3": Qwen3Config(
        hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=6, num_key_value_heads=2,
        head_dim=128, tie_word_embeddings=True,
    ),
    "tiny-llama": LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    ),
    "tiny-qwen3": Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32,
    ),
}  # fmt: skip
"""Sizes are multiples of 64 (a block of NF4), and so of 16, which FP8 needs. The tiny ones are for a CPU."""


def make_base(name: str, conversations: Sequence[Conversation], folder: Path, reading: Reading) -> float:
    """Writes model and tokenizer to `folder`; returns the mean training loss of the last tenth of the steps."""
    texts = [_text(conversation) for conversation in conversations]
    tokenizer = _tokenizer(texts[:TOKENIZER_TEXTS], reading.vocabulary)
    tokens = torch.tensor([token for text in tokenizer(texts)["input_ids"] for token in text])

    config = CONFIGS[name]
    config.update(
        {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 1024,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    loss = _read(model, tokens, reading)

    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


def _text(conversation: Conversation) -> str:
    """A conversation in ChatML, the form in which the jobs will show theirs."""
    turns = [f"<|im_start|>{turn['role']}\n{turn['content'].strip()}{END}\n" for turn in conversation["messages"]]
    return "".join(turns)


def _tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE of `texts`."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token=END, pad_token=PAD)  # type: ignore[no-untyped-call]


def _read(model: Any, tokens: torch.Tensor, reading: Reading) -> float:
    """Trains all weights on rows drawn from `tokens` [N]; returns the mean loss of the last tenth of the steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokens = model.to(device).train(), tokens.to(device)
    draw = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=reading.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda"
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, reading.steps))
    places = torch.arange(reading.length, device=device)

    losses: list[torch.Tensor] = []
    for _ in range(reading.steps):
        starts = torch.randint(len(tokens) - reading.length, (reading.rows, 1), generator=draw)
        rows = tokens[starts.to(device) + places]  # [B, T]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=rows, labels=rows).loss

        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    last = losses[-max(1, reading.steps // 10) :]
    return float(torch.stack(last).mean())


def _pace(step: int, steps: int) -> float:
    """Factor on the learning rate: up linearly, then down along a cosine to a tenth."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
