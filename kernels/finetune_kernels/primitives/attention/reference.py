"""Attention over packed sequences by its formula, forward and backward: what the backends are compared with.

    s  = scale q k, or c tanh(scale q k / c) if scores are capped,   p = softmax(s),   out = p v
    with sinks   p = softmax([s, sink]) without its last column
    ds = p * (dout v - sum(dout * out)) * (1 - (s / c)^2)            the last factor only if scores are capped
    dq = scale ds k,   dk = scale ds^T q,   dv = p^T dout

Everything is computed in the dtype of q, with scores of [H, L, L] in memory. Shapes are those of `inputs`.
"""

import torch

from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv


def reference(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> torch.Tensor:
    """Returns out [T, H, D], one sequence after the other."""
    return torch.cat([_forward(qkv.select(rows), params) for rows in sequences.slices()])


def reference_backward(dout: torch.Tensor, qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> Qkv:
    """Returns the gradients of q, k and v for `dout` [T, H, D], one sequence after the other."""
    found = [_backward(dout[rows], qkv.select(rows), params) for rows in sequences.slices()]
    return Qkv(*(torch.cat(gradients) for gradients in zip(*found, strict=True)))


def _repeat_heads(qkv: Qkv) -> Qkv:
    """Returns k and v with a head for each query head, [L, H, D]."""
    return Qkv(qkv.q, *(part.repeat_interleave(qkv.groups, dim=1) for part in (qkv.k, qkv.v)))


def _probabilities(q: torch.Tensor, k: torch.Tensor, params: AttentionParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the scores s and the probabilities p of one sequence, [H, L, L] each."""
    s = torch.einsum("ihd,jhd->hij", q, k) * params.scale
    if params.softcap is not None:
        s = params.softcap * torch.tanh(s / params.softcap)

    position = torch.arange(q.shape[0], device=q.device)
    distance = position[:, None] - position
    unseen = (distance < 0) | (distance >= (params.window or q.shape[0]))
    seen = s.masked_fill(unseen, -torch.inf)
    if params.sinks is None:
        return s, seen.softmax(-1)
    sinks = params.sinks.to(s.dtype)[:, None, None].expand(-1, s.shape[1], 1)  # [H, L, 1]
    return s, torch.cat((seen, sinks), dim=-1).softmax(-1)[..., :-1]


def _forward(qkv: Qkv, params: AttentionParams) -> torch.Tensor:
    q, k, v = _repeat_heads(qkv)
    return torch.einsum("hij,jhd->ihd", _probabilities(q, k, params)[1], v)


def _backward(dout: torch.Tensor, qkv: Qkv, params: AttentionParams) -> Qkv:
    q, k, v = _repeat_heads(qkv)
    s, p = _probabilities(q, k, params)
    out = torch.einsum("hij,jhd->ihd", p, v)

    delta = (dout * out).sum(-1).T.unsqueeze(-1)  # [H, L, 1]
    ds = p * (torch.einsum("ihd,jhd->hij", dout, v) - delta)
    if params.softcap is not None:
        ds = ds * (1 - (s / params.softcap) ** 2)

    dq = params.scale * torch.einsum("hij,jhd->ihd", ds, k)
    dk = params.scale * torch.einsum("hij,ihd->jhd", ds, q)
    dv = torch.einsum("hij,ihd->jhd", p, dout)

    # a key-value head was repeated for each query head of its group: the gradients of a group are summed
    shape = (k.shape[0], qkv.k.shape[1], qkv.groups, k.shape[2])  # [L, H_kv, groups, D]
    return Qkv(dq, dk.reshape(shape).sum(2), dv.reshape(shape).sum(2))
