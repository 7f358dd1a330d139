"""Cases of attention by backend, of attention with capped scores, and of the optimiser."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from benchmarks.micro_case import Case, Sizes, backward_of
from finetune_kernels.ops import attention, softcap_attention
from finetune_kernels.ops.rotary_embedding import Heads
from finetune_kernels.primitives.attention import flash, flash4
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_kernels.primitives.multi_tensor_adamw import MultiTensorAdamW


def attention_cases(sizes: Sizes) -> Iterator[Case]:
    """Yields cases of one and of two sequences, by the backends that a pass has whose shape has come before: without
    FlashAttention 4, which takes all of them, cuDNN those of equal lengths and FlashAttention the others. Then cases of
    FlashAttention 4, where it is installed."""
    half = sizes.tokens // 2
    for longest, lengths in (("2 documents", (half, half)), ("1 document", (sizes.tokens,))):
        yield from _backend_cases(sizes, f"cuDNN, {longest}", lengths)
    yield from _backend_cases(sizes, "FlashAttention, 2 documents", (half - 1, half + 1))
    yield from _backend_cases(sizes, "FlashAttention, 1 document", (1, sizes.tokens - 1))

    mixed = _mixed_lengths(sizes.tokens)
    yield from _flash4_cases(sizes, "mixed documents", mixed)
    yield from _flash4_cases(sizes, "1 document", (sizes.tokens,))
    yield from _flash4_cases(sizes, "window", (sizes.tokens,), sizes.tokens // 8)
    yield from _flash4_cases(sizes, "heads of 256", (sizes.tokens,), heads=Heads(16, 4, 256))


def _mixed_lengths(tokens: int) -> tuple[int, ...]:
    """Lengths as in a pack of conversations: each two thirds of the one before, and the rest."""
    found: list[int] = []
    while tokens - sum(found) > 64:
        found.append(max(64, (tokens - sum(found)) // 3))
    return *found, tokens - sum(found)


def _sequences(sizes: Sizes, lengths: tuple[int, ...]) -> PackedSequences:
    cu_seqlens = torch.tensor([0, *lengths], device=sizes.device).cumsum(0).to(torch.int32)
    return PackedSequences(cu_seqlens, max(lengths), sum(lengths), comes_again=True)


def _flash4_cases(
    sizes: Sizes, name: str, lengths: tuple[int, ...], window: int | None = None, heads: Heads | None = None
) -> Iterator[Case]:
    """Yields cases of FlashAttention 4 beside the FlashAttention that PyTorch ships, where it is installed."""
    heads = heads or sizes.heads
    params, sequences = AttentionParams(heads.size**-0.5, window), _sequences(sizes, lengths)
    qkv = heads.split(sizes.random(sizes.tokens, heads.width))
    if not flash4.takes(qkv, sequences, params):
        return
    dout = sizes.random(sizes.tokens, heads.query, heads.size)
    out, saved = flash4.forward(qkv, sequences, params)
    theirs, their_saved = flash.forward(qkv, sequences, params)

    # pairs of a query and a key
    pairs = sum(
        length**2 / 2 if window is None or length <= window else window * (length - window / 2) for length in lengths
    )
    forward = 4.0 * pairs * heads.query * heads.size
    shape = f"{len(lengths)} of {min(lengths)} to {max(lengths)}, {heads.query}/{heads.key_value} x {heads.size}"
    shape += f", {window} keys" if window else ""
    yield Case(
        f"attention, FlashAttention 4, {name}", "forward", shape, forward, "TFLOP/s",
        lambda: flash4.forward(qkv, sequences, params), lambda: flash.forward(qkv, sequences, params),
        rival_name="FlashAttention",
    )  # fmt: skip
    yield Case(
        f"attention, FlashAttention 4, {name}", "backward", shape, 2.5 * forward, "TFLOP/s",
        lambda: flash4.backward(dout, qkv, out, saved, sequences, params),
        lambda: flash.backward(dout, qkv, theirs, their_saved, sequences, params),
        rival_name="FlashAttention",
    )  # fmt: skip


def _backend_cases(sizes: Sizes, name: str, lengths: tuple[int, ...]) -> Iterator[Case]:
    heads, params, sequences = sizes.heads, AttentionParams(sizes.heads.size**-0.5), _sequences(sizes, lengths)
    qkv = heads.split(sizes.random(sizes.tokens, heads.width))
    dout = sizes.random(sizes.tokens, heads.query, heads.size)
    out, saved = attention.forward(qkv, sequences, params)

    # two products of L x L / 2 forward, five backward
    forward = 2.0 * sum(length**2 for length in lengths) * heads.query * heads.size
    shape = f"{' + '.join(map(str, lengths))}, {heads.query}/{heads.key_value} x {heads.size}"
    plain = _plain(lengths) if len(set(lengths)) == 1 else None

    yield Case(
        f"attention, {name}", "forward", shape, forward, "TFLOP/s",
        lambda: attention.forward(qkv, sequences, params), plain and (lambda: plain(*qkv)),
    )  # fmt: skip
    yield Case(
        f"attention, {name}", "backward", shape, 2.5 * forward, "TFLOP/s",
        lambda: attention.backward(dout, qkv, out, saved, sequences, params),
        plain and backward_of(plain, [part.contiguous() for part in qkv], dout),
    )  # fmt: skip


def _plain(lengths: tuple[int, ...]) -> Callable[..., torch.Tensor]:
    """Returns SDPA with the backend that it chooses itself, for sequences of one length: [T, H, D] -> [T, H, D]."""

    def attend(*parts: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.reshape(len(lengths), lengths[0], *part.shape[1:]).transpose(1, 2) for part in parts)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(parts[0].shape)

    return attend


def softcap_cases(sizes: Sizes) -> Iterator[Case]:
    """Yields cases of capped scores over one sequence, without and within a window."""
    heads, length = sizes.softcap_heads, sizes.tokens
    sequences = PackedSequences.of_length(length, 1, torch.device(sizes.device))
    qkv = heads.split(sizes.random(length, heads.width))
    dout = sizes.random(length, heads.query, heads.size)

    for name, window in (("capped_attention", None), ("capped_attention, window", length // 4)):
        params = AttentionParams(heads.size**-0.5, window, softcap=50.0)
        out, lse = softcap_attention.forward(qkv, sequences, params)

        seen = length**2 / 2 if window is None else window * (length - window / 2)  # pairs of a query and a key
        work = 4.0 * seen * heads.query * heads.size
        shape = f"{length}, {heads.query}/{heads.key_value} x {heads.size}" + (f", {window} keys" if window else "")

        yield Case(
            name, "forward", shape, work, "TFLOP/s", partial(softcap_attention.forward, qkv, sequences, params),
            partial(softcap_attention.reference, qkv, sequences, params),
        )  # fmt: skip
        yield Case(
            name, "backward", shape, 2.5 * work, "TFLOP/s",
            partial(softcap_attention.backward, dout, qkv, out, lse, sequences, params),
            partial(softcap_attention.reference_backward, dout, qkv, sequences, params),
        )  # fmt: skip
        if flash4.takes(qkv, sequences, params):
            yield from _capped_cases((f"{name}, FlashAttention 4", shape), work, dout, (qkv, sequences, params))


def _capped_cases(
    title: tuple[str, str], work: float, dout: torch.Tensor, inputs: tuple[Qkv, PackedSequences, AttentionParams]
) -> Iterator[Case]:
    """Yields cases of FlashAttention 4 with capped scores beside our own kernel; `title`: name and shape."""
    (name, shape), (qkv, sequences, params) = title, inputs
    out, saved = flash4.forward(*inputs)
    ours, lse = softcap_attention.forward(*inputs)

    yield Case(
        name, "forward", shape, work, "TFLOP/s", partial(flash4.forward, *inputs),
        partial(softcap_attention.forward, *inputs), rival_name="our own",
    )  # fmt: skip
    yield Case(
        name, "backward", shape, 2.5 * work, "TFLOP/s",
        partial(flash4.backward, dout, qkv, out, saved, sequences, params),
        partial(softcap_attention.backward, dout, qkv, ours, lse, sequences, params), rival_name="our own",
    )  # fmt: skip


def optimizer_cases(sizes: Sizes) -> Iterator[Case]:
    """Yields the case of a step of 8-bit AdamW over all adapters, including the gathering of gradients."""
    from bitsandbytes.optim.adamw import AdamW8bit

    ours: Any = MultiTensorAdamW(_adapters(sizes), AdamW8bit, lr=1e-4)
    theirs: Any = AdamW8bit(_adapters(sizes), lr=1e-4)  # type: ignore[no-untyped-call]
    count = sum(parameter.numel() for group in ours.param_groups for parameter in group["params"])
    tensors = sum(len(group["params"]) for group in ours.param_groups)

    # The master weight (fp32) and both 8-bit moments are read and written; the gradient is read, written in fp32 when
    # gathered (once with zeros), and read again; the master weight is read and written once more, rounded.
    work = count * (8 + 4 + sizes.element + 12 + 4 + sizes.element)
    yield Case(
        "flat_adamw", "step", f"{count / 1e6:.1f} M in {tensors} tensors", work, "TB/s", ours.step, rival=theirs.step,
        rival_name="bitsandbytes",
    )  # fmt: skip


def _adapters(sizes: Sizes) -> list[torch.nn.Parameter]:
    """Returns A [r, in] and B [out, r] of every linear layer, with gradients."""
    heads, n, f = sizes.heads, sizes.hidden, sizes.feed_forward
    wide, narrow = heads.query * heads.size, heads.key_value * heads.size
    linears = [(n, wide), (n, narrow), (n, narrow), (wide, n), (n, f), (n, f), (f, n)] * sizes.layers  # (in, out)

    found = []
    for features, outputs in linears:
        for shape in ((sizes.rank, features), (outputs, sizes.rank)):
            parameter = torch.nn.Parameter(sizes.random(*shape, scale=0.02))
            parameter.grad = sizes.random(*shape, scale=0.02)
            found.append(parameter)
    return found
