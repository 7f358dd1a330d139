"""Greedy answers of transformers in fp32 to prompts of token ids, to be compared with those of llama.cpp."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.activations import GELUTanh, NewGELUActivation

from finetune_test_programs.generation import banned_tokens

CLOSEST = 2e-5
"""Where the two best tokens are closer, neither is right and that answer ends."""

FORGETFUL = ("bamba",)
"""Model types of transformers that count positions from 0 in every call which does not name them."""


@dataclass(frozen=True)
class Expected:
    """Answers and log-probabilities of transformers."""

    answers: list[list[int]]
    leads: torch.Tensor
    """The lead of each chosen token over the next best, fp32 [prompts, tokens]."""
    next: torch.Tensor
    """Log-probabilities after each prompt, fp32 [prompts, tokens]."""
    banned: list[int]

    def settled(self, answers: list[list[int]]) -> list[list[int]]:
        """The beginning of each of `answers` that leaves no choice: up to the first lead that is none."""
        is_close = self.leads <= CLOSEST
        ends = torch.where(is_close.any(1), is_close.int().argmax(1), is_close.shape[1]).tolist()
        return [answer[:end] for answer, end in zip(answers, ends, strict=True)]


class TableGelu(torch.nn.Module):
    """GELU as llama.cpp computes it on a CPU: by a table of 16-bit values, unlike everything else (1e-4 in the
    log-probabilities of Gemma models, 2e-3 of StarCoder2 and Phi-2)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        looked_up = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, looked_up))


def _load(base: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, GELUTanh | NewGELUActivation):
                setattr(module, name, TableGelu())
    return model.eval()


@torch.no_grad()
def said_by_transformers(base: Path, prompts: list[list[int]], tokens: int) -> Expected:
    """Answers to prompts, of `tokens` tokens each; prompts of one length stand together."""
    model = _load(base)
    banned = banned_tokens(base)
    answers, following = [], []
    leads: list[torch.Tensor] = []

    for length, group in groupby(prompts, key=len):
        text = torch.tensor(list(group))
        cache, steps = None, []
        for step in range(tokens):
            new = text if cache is None else text[:, -1:]
            named = {"position_ids": _last_positions(text, new)} if model.config.model_type in FORGETFUL else {}
            said = model(new, past_key_values=cache, use_cache=True, **named)
            logits, cache = said.logits[:, -1], said.past_key_values
            if step == 0:
                following.append(logits.log_softmax(-1))
            logits[:, banned] = -torch.inf
            best = logits.topk(2, dim=-1)
            steps.append(best.values[:, 0] - best.values[:, 1])
            text = torch.cat([text, best.indices[:, :1]], dim=1)

        answers += text[:, length:].tolist()
        leads.append(torch.stack(steps, dim=1))
    return Expected(answers, torch.cat(leads), torch.cat(following), banned)


def _last_positions(text: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Positions of the tokens `new` at the end of `text`: [prompts, tokens]."""
    return torch.arange(text.shape[1])[-new.shape[1] :].expand(new.shape)
