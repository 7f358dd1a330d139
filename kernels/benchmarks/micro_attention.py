"""The cases of attention, by backend, of attention with capped scores, and of the optimiser."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from benchmarks.micro_case import Case, Sizes, backward_of
from finetune_kernels.ops import attention, softcap_attention
from finetune_kernels.ops.attention import AttentionParams, PackedSequences
from finetune_kernels.primitives.multi_tensor_adamw import MultiTensorAdamW8bit


def attention_cases(sizes: Sizes) -> Iterator[Case]:
    """Two documents that fill the tokens, and one; of equal length for cuDNN, a token apart for FlashAttention."""
    half = sizes.tokens // 2
    for longest, lengths in (("2 documents", (half, half)), ("1 document", (sizes.tokens,))):
        yield from _backend_cases(sizes, f"cuDNN, {longest}", lengths)
    yield from _backend_cases(sizes, "FlashAttention, 2 documents", (half - 1, half + 1))
    yield from _backend_cases(sizes, "FlashAttention, 1 document", (1, sizes.tokens - 1))


def _backend_cases(sizes: Sizes, name: str, lengths: tuple[int, ...]) -> Iterator[Case]:
    heads, params = sizes.heads, AttentionParams(sizes.heads.size**-0.5)
    ends = torch.tensor([0, *lengths], device=sizes.device).cumsum(0).to(torch.int32)
    documents = PackedSequences(ends, max(lengths), sum(lengths))
    q, k, v = heads.split(sizes.random(sizes.tokens, heads.width))
    dout = sizes.random(sizes.tokens, heads.query, heads.size)
    out, saved = attention.forward(q, k, v, documents, params)
    # two products of L x L / 2 forward, five backward
    forward = 2.0 * sum(length**2 for length in lengths) * heads.query * heads.size
    shape = f"{' + '.join(map(str, lengths))}, {heads.query}/{heads.key_value} x {heads.size}"
    plain = _plain(lengths) if len(set(lengths)) == 1 else None
    yield Case(
        f"attention, {name}", "forward", shape, forward, "TFLOP/s",
        lambda: attention.forward(q, k, v, documents, params), plain and (lambda: plain(q, k, v)),
    )  # fmt: skip
    yield Case(
        f"attention, {name}", "backward", shape, 2.5 * forward, "TFLOP/s",
        lambda: attention.backward(dout, q, k, v, out, saved, documents, params),
        plain and backward_of(plain, [part.contiguous() for part in (q, k, v)], dout),
    )  # fmt: skip


def _plain(lengths: tuple[int, ...]) -> Callable[..., torch.Tensor]:
    """SDPA as it chooses itself, for documents of one length: [T, H, D] -> [T, H, D]."""

    def attend(*parts: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.reshape(len(lengths), lengths[0], *part.shape[1:]).transpose(1, 2) for part in parts)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(parts[0].shape)

    return attend


def softcap_cases(sizes: Sizes) -> Iterator[Case]:
    """Capped scores over one document, by a kernel of ours, without and within a window."""
    heads, scale, softcap = sizes.softcap_heads, sizes.softcap_heads.size**-0.5, 50.0
    length = sizes.tokens
    ends = torch.tensor([0, length], dtype=torch.int32, device=sizes.device)
    q, k, v = heads.split(sizes.random(length, heads.width))
    dout = sizes.random(length, heads.query, heads.size)
    for name, window in (("capped_attention", None), ("capped_attention, window", length // 4)):
        params = length, scale, softcap, window
        out, sums = softcap_attention.forward(q, k, v, ends, *params)
        seen = length**2 / 2 if window is None else window * (length - window / 2)  # pairs of a query and a key
        work = 4.0 * seen * heads.query * heads.size
        shape = f"{length}, {heads.query}/{heads.key_value} x {heads.size}" + (f", {window} keys" if window else "")
        yield Case(
            name, "forward", shape, work, "TFLOP/s", partial(softcap_attention.forward, q, k, v, ends, *params),
            partial(softcap_attention.reference, q, k, v, scale, softcap, window),
        )  # fmt: skip
        yield Case(
            name, "backward", shape, 2.5 * work, "TFLOP/s",
            partial(softcap_attention.backward, dout, q, k, v, out, sums, ends, *params),
            partial(softcap_attention.reference_backward, dout, q, k, v, scale, softcap, window),
        )  # fmt: skip


def optimizer_cases(sizes: Sizes) -> Iterator[Case]:
    """A step of 8-bit AdamW over all adapters, gradients gathered on the way."""
    from bitsandbytes.optim.adamw import AdamW8bit

    ours: Any = MultiTensorAdamW8bit(_adapters(sizes), lr=1e-4)
    theirs: Any = AdamW8bit(_adapters(sizes), lr=1e-4)  # type: ignore[no-untyped-call]
    count = sum(parameter.numel() for group in ours.param_groups for parameter in group["params"])
    tensors = sum(len(group["params"]) for group in ours.param_groups)
    # the weight and both 8-bit moments are read and written; the gradient is read, written when gathered, read again
    work = count * (2 * sizes.element + 4 + 3 * sizes.element)
    yield Case(
        "flat_adamw", "step", f"{count / 1e6:.1f} M in {tensors} tensors", work, "TB/s", ours.step, rival=theirs.step,
        rival_name="bitsandbytes",
    )  # fmt: skip


def _adapters(sizes: Sizes) -> list[torch.nn.Parameter]:
    heads, n, f = sizes.heads, sizes.hidden, sizes.feed_forward
    wide, narrow = heads.query * heads.size, heads.key_value * heads.size
    linears = [(n, wide), (n, narrow), (n, narrow), (wide, n), (n, f), (n, f), (f, n)] * sizes.layers
    found = []
    for features, outputs in linears:
        for shape in ((sizes.rank, features), (outputs, sizes.rank)):
            parameter = torch.nn.Parameter(sizes.random(*shape, scale=0.02))
            parameter.grad = sizes.random(*shape, scale=0.02)
            found.append(parameter)
    return found
