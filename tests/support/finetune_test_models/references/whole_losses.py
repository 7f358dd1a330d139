"""Losses by transformers' own model, whole in memory and in fp32, on rows of random tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetune_trainer.chat.labels import IGNORED, Encoded
from finetune_trainer.training.losses import supervised_loss


def make_rows(*lengths: int) -> list[Encoded]:
    """Rows of these lengths in tokens; the first third of each is not predicted."""
    chance = torch.Generator().manual_seed(3)
    rows = [torch.randint(5, 300, (length,), generator=chance).tolist() for length in lengths]
    return [Encoded(ids, [IGNORED] * (len(ids) // 3) + ids[len(ids) // 3 :]) for ids in rows]


@torch.no_grad()
def whole_loss(model: Any, rows: Sequence[Encoded]) -> float:
    """Nats per supervised token."""
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor([row.labels])
        positions = torch.nonzero(labels[0, 1:] != IGNORED).flatten()
        total += supervised_loss(model, {"input_ids": torch.tensor([row.input_ids])}, labels, positions, 1).item()
        count += positions.numel()
    return total / count


def load_in_fp32(folder: Path) -> Any:
    """The model of a folder, with the attention that computes its soft cap."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model


def routed_loss(
    model: Any, rows: Sequence[Encoded], routes: Sequence[torch.Tensor] | None = None
) -> tuple[float, list[torch.Tensor]]:
    """Nats per supervised token of a Qwen mixture, and the experts of each router's call, [tokens, experts of a token];
    with `routes`, tokens go to those experts instead."""
    seen: list[torch.Tensor] = []

    def route(router: Any, _: Any, found: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, weights, chosen = found
        if routes is not None:
            chosen = routes[len(seen)]
            weights = torch.softmax(router.linear_logits, dim=-1).gather(-1, chosen)
            weights = (weights / weights.sum(-1, keepdim=True)).to(found[1].dtype)
        seen.append(chosen)
        return logits, weights, chosen

    def keep_logits(router: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        hidden = arguments[0].reshape(-1, router.weight.shape[1])
        router.linear_logits = torch.nn.functional.linear(hidden, router.weight)

    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [hook for each in routers for hook in (
        each.register_forward_pre_hook(keep_logits), each.register_forward_hook(route))]  # fmt: skip
    try:
        return whole_loss(model, rows), seen
    finally:
        for hook in hooks:
            hook.remove()
