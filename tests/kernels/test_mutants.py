"""Every kernel's comparison with its formula must notice a mistake in the kernel: one line of its source is changed,
the package is loaded afresh with that line, and the comparison that the true source passes has to fail."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.optim import AdamW8bit
from peft import LoraConfig, get_peft_model

from finetune_kernels.primitives.adapter_dropout import DropoutSeed, Mask, new_dropout_seed
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_test_kernels.grouped_checks import low_rank, token_sums
from finetune_test_kernels.mutated_kernels import Load, loaded_afresh, true_modules, write_mutant
from finetune_test_kernels.norm_checks import (
    Pairs,
    adapted_activation,
    gated_activation,
    plain_activation,
    rms_norm,
    rotary_embedding,
)
from finetune_test_kernels.small_layers import OurDropout, cos_sin_of, drop_by, small_model
from finetune_test_kernels.tensor_checks import DEVICE, normal, relative_error

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
FUSED = ("fused_layers", "decoder_layer", "tiled_mlp")
TOLERANCE = 5e-6  # fp32; at most 2e-6 was measured, and at least 1e-3 with a mistake


def errors(pairs: Pairs) -> Iterator[float]:
    """Relative errors, one after the other; infinite where anything is no number."""
    for found, expected in pairs:
        error = relative_error(found, expected)
        yield float("inf") if error != error else error


def linear_cross_entropy(load: Load) -> Pairs:
    ours, true = load("linear_cross_entropy"), true_modules("linear_cross_entropy")
    ours.CHUNK_ROWS, ours.MAX_BLOCK = 2, 8
    hidden, weight, targets = normal(3, 6), normal(19, 6, seed=1), torch.tensor([0, 18, 9], device=DEVICE)
    for softcap in (None, 2.0):
        leaf = hidden.clone().requires_grad_()
        loss = ours.LinearCrossEntropyFunction.apply(leaf, weight, targets, softcap)
        exact = (hidden.double(), weight.double(), targets, softcap)
        yield loss, true.reference(*exact)
        yield torch.autograd.grad(3 * loss, leaf)[0], 3 * true.reference_gradient(*exact)


def blocked_cross_entropy(load: Load) -> Pairs:
    ours, true = load("blocked_cross_entropy"), true_modules("linear_cross_entropy")
    ours.VOCABULARY_BLOCK, ours.MAX_BLOCK, ours.HEAD_ROWS = 8, 4, 2
    hidden, weight, targets = normal(3, 6), normal(19, 6, seed=1), torch.tensor([0, 18, 9], device=DEVICE)
    for softcap in (None, 2.0):
        leaf = hidden.clone().requires_grad_()
        loss = ours.blocked_cross_entropy(leaf, weight, targets, softcap)
        exact = (hidden.double(), weight.double(), targets, softcap)
        yield loss, true.reference(*exact)
        yield torch.autograd.grad(3 * loss, leaf)[0], 3 * true.reference_gradient(*exact)


def nf4(load: Load) -> Pairs:
    ours = load("nf4")
    for nested in (True, False):
        weights = normal(33, 499) * 0.02  # two blocks of scales, the last not full
        packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=nested)
        found = ours.dequantize(packed, state, torch.full_like(weights, float("nan")))
        yield (found != dequantize_4bit(packed, state)) + 1.0, torch.ones_like(weights)  # to the bit


def nf4_bytes(load: Load) -> Pairs:
    """To the bit."""
    ours, true = load("nf4_bytes"), true_modules("nf4_bytes")
    weights = normal(9, 704) * torch.linspace(0, 1, 9, device=DEVICE)[:, None]
    packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        inverses = 1 / ours.row_scales(state, dtype)
        yield inverses, 1 / true.row_scales(state, dtype)
        expected = true.reference(packed, state, 1 / true.row_scales(state, dtype), dtype).view(torch.uint8)
        for transposed in (False, True):
            size = (704, 9) if transposed else (9, 704)
            found = ours.decode(packed, state, inverses, torch.zeros(size, dtype=dtype), transposed=transposed)
            bits = found.view(torch.uint8)
            yield ((bits.T if transposed else bits) != expected) + 1.0, torch.ones(expected.shape)


def lora_linear(load: Load) -> Pairs:
    ours, true = load("lora_linear"), true_modules("lora_linear")
    w, bias, dy = normal(5, 4, seed=1), normal(5, seed=2), normal(2, 3, 5, seed=5)
    inputs = [normal(2, 3, 4), normal(2, 4, seed=3), normal(5, 2, seed=4)]
    leaves = [value.clone().requires_grad_() for value in inputs]
    exact = [value.double().requires_grad_() for value in inputs]
    y = ours.lora_linear(leaves[0], lambda: w, *leaves[1:], 0.5, bias)
    expected = true.reference(exact[0], w.double(), *exact[1:], 0.5, bias.double())
    found = torch.autograd.grad(y, leaves, dy)
    yield y, expected
    yield from zip(found, torch.autograd.grad(expected, exact, dy.double()), strict=True)


def adapter_dropout(load: Load) -> Pairs:
    ours, true = load("adapter_dropout"), true_modules("adapter_dropout")
    ours.BLOCK_T, ours.BLOCK_R = 16, 16
    mask = Mask(DropoutSeed(2**30 + 5, first_row=3), 2, 0.3)
    x, dx, d, a = normal(17, 140)[:, :138], normal(17, 138, seed=1), normal(17, 20, seed=2)[:, :18], normal(18, 138)
    yield ours.drop(x, mask), true.reference(x.double(), mask)
    exact = true.reference_add_lora_dx(dx.double(), d.double(), a.double(), mask)
    yield ours.add_lora_dx(dx, d, a, mask), exact


def linear_group(load: Load) -> Pairs:
    """Against peft, by autograd: plain, with dropout, with magnitudes."""
    for options in ({}, {"lora_dropout": 0.5}, {"use_dora": True}):
        torch.manual_seed(0)
        plain = torch.nn.ModuleDict({name: torch.nn.Linear(6, 4) for name in ("q_proj", "k_proj", "v_proj")})
        get_peft_model(plain, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], **options))  # type: ignore[arg-type]
        for parameter in plain.parameters():
            torch.nn.init.normal_(parameter)
        layers = list(plain.to(DEVICE).values())
        group = load("linear_group").LinearGroup(layers, torch.float32, keep_dequantized=True, philox_stream=4)
        for stream in (0, 2) if "lora_dropout" in options else ():
            layers[stream].lora_dropout["default"] = OurDropout(Mask(DropoutSeed(8), 4 + stream, 0.5))
        x, dy = normal(3, 6).requires_grad_(), normal(3, 12, seed=1)
        expected = torch.cat([layer(x) for layer in layers], dim=1)
        exact = torch.autograd.grad(expected, [x, *group.parameters], dy)
        with torch.no_grad():
            pass_ctx = group.begin(DropoutSeed(8))
            y, xa = group.forward(x, pass_ctx)
            dx, d_xa = group.backward(dy, pass_ctx)
            found = [dx, *group.gradients(dy, x, xa, d_xa, pass_ctx)]
        yield y, expected
        yield from zip(found, exact, strict=True)


def whole_layer(load: Load) -> Pairs:
    """Against transformers and peft, by autograd; every way of keeping."""
    fused_layers = load("fused_layers")
    policies = load("decoder_layer").ActivationPolicy
    for kind in ("llama", "qwen3", "phi3", "gemma2"):
        model = small_model(kind, torch.float32).to(DEVICE)
        inputs = [value for value in model.parameters() if value.requires_grad]
        expected = _layer_results(model, inputs)
        fused = fused_layers.FusedLayers(
            model.get_base_model(), [policies.SAVE_ALL], torch.float32, keep_dequantized=True
        )
        for policy in (policies.SAVE_ALL, policies.RECOMPUTE_MLP, policies.RECOMPUTE_ALL, policies.OFFLOAD):
            fused.set_policies([policy])
            yield from zip(_layer_results(model, inputs), expected, strict=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(load("tiled_mlp"), "TILE_ROWS", 2)
            for policy in (policies.RECOMPUTE_MLP, policies.RECOMPUTE_ALL):
                fused.set_policies([policy])
                yield from zip(_layer_results(model, inputs), expected, strict=True)


def dropped_layer(load: Load) -> Pairs:
    """Against transformers and peft with our masks; every way of keeping."""
    policies = load("decoder_layer").ActivationPolicy
    dropped, model = (small_model("llama", torch.float32, lora_dropout=0.4).to(DEVICE) for _ in range(2))
    torch.manual_seed(3)
    drop_by(dropped.get_base_model(), [new_dropout_seed()])
    inputs, ours = ([value for value in each.parameters() if value.requires_grad] for each in (dropped, model))
    expected = _layer_results(dropped, inputs)
    fused = load("fused_layers").FusedLayers(
        model.get_base_model(), [policies.OFFLOAD], torch.float32, keep_dequantized=True
    )
    for policy, rows in (
        (policies.SAVE_ALL, 9),
        (policies.RECOMPUTE_MLP, 9),
        (policies.RECOMPUTE_ALL, 3),
        (policies.OFFLOAD, 9),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(load("tiled_mlp"), "TILE_ROWS", rows)
            fused.set_policies([policy])
            torch.manual_seed(3)
            yield from zip(_layer_results(model, ours), expected, strict=True)


def _layer_results(model: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    causal = model.get_base_model()
    x = normal(1, 5, 32).requires_grad_()
    cos_sin = cos_sin_of(causal, x, torch.arange(5, device=DEVICE).unsqueeze(0))
    seen = torch.ones(5, 5, dtype=torch.bool, device=DEVICE).tril()[None, None]
    mask = torch.zeros(1, 1, 5, 5, device=DEVICE).masked_fill(~seen, -torch.inf)  # eager attention goes by it
    y = causal.model.layers[0](x, attention_mask=mask, position_embeddings=cos_sin)
    y = y if isinstance(y, torch.Tensor) else y[0]
    return [y, *torch.autograd.grad(y, [x, *inputs], normal(*y.shape, seed=1))]


def softcap_attention(load: Load) -> Pairs:
    ours, true = load("softcap_attention"), true_modules("softcap_attention")
    q, k, v, dout = (normal(35, heads, 16, seed=heads + seed) for seed, heads in enumerate((4, 2, 2, 4)))
    qkv, sequences = Qkv(q, k, v), PackedSequences.of_length(35, 1, torch.device(DEVICE))
    exact = Qkv(*(part.double() for part in qkv))
    for window in (None, 20):
        params = AttentionParams(0.6, window, 1.5)
        out, lse = ours.forward(qkv, sequences, params)
        yield out, true.reference(exact, sequences, params)
        found = ours.backward(dout, qkv, out, lse, sequences, params)
        yield from zip(found, true.reference_backward(dout.double(), exact, sequences, params), strict=True)


def supervised_loss(load: Load) -> Pairs:
    """Against transformers' own loss of a row with labels here and there."""
    causal = small_model("llama", torch.float32).to(DEVICE).get_base_model()
    tokens = torch.arange(9, device=DEVICE).unsqueeze(0)
    labels = (tokens * 5 % 24).masked_fill(tokens % 3 == 1, -100)
    supervised = (labels[0, 1:] != -100).nonzero().squeeze(1)
    inputs = {"input_ids": tokens, "position_ids": tokens}
    expected = causal(**inputs, labels=labels).loss
    yield load("supervised_loss").fused_supervised_loss(causal, inputs, labels, supervised, None), expected


def patching(load: Load) -> Pairs:
    """Module by module against the models themselves."""
    for kind in ("llama", "gemma2", "phi3"):
        model = small_model(kind, torch.float32).to(DEVICE)
        inputs = [value for value in model.parameters() if value.requires_grad]
        tokens = torch.arange(3, 12, device=DEVICE).unsqueeze(0)
        results = []
        for _ in range(2):
            logits = model(input_ids=tokens, use_cache=False).logits
            results.append([logits, *torch.autograd.grad(logits, inputs, normal(*logits.shape))])
            load("patching").patch_model(model, keep_dequantized=False)
        yield from zip(results[1], results[0], strict=True)


def multi_tensor_adamw(load: Load) -> Pairs:
    """Two steps with clipping, against bitsandbytes and torch."""
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    ours, theirs = ([torch.nn.Parameter(normal(64, 80, seed=seed)) for seed in range(2)] for _ in range(2))
    flat, plain = load("multi_tensor_adamw").MultiTensorAdamW(ours, AdamW8bit, **options), AdamW8bit(theirs, **options)
    starts = [value.detach().clone() for value in ours]
    for step, size in enumerate((1e-6, 100.0)):
        for seed, pair in enumerate(zip(ours, theirs, strict=True)):
            for value in pair:
                value.grad = size * normal(64, 80, seed=10 * step + seed)
        yield flat.clip_gradients(1.0), torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        if step == 1:
            yield torch.cat([vector.master.grad for vector in flat._vectors]).norm(), torch.ones((), device=DEVICE)
        flat.step()
        plain.step()
        if step == 0:  # later a gradient that is off by one bit may fall into the next 8-bit state
            for start, mine, other in zip(starts, ours, theirs, strict=True):
                yield mine - start, other - start


CHECKS = {
    check.__name__: check
    for check in (
        rms_norm, gated_activation, adapted_activation, rotary_embedding, linear_cross_entropy, blocked_cross_entropy,
        nf4, nf4_bytes, lora_linear, linear_group, whole_layer, supervised_loss, patching, multi_tensor_adamw,
        softcap_attention, adapter_dropout, dropped_layer, plain_activation, low_rank, token_sums,
    )
}  # fmt: skip

with Path(__file__).with_name("mutants.yaml").open() as file:
    MUTANTS = [
        (check, row.get("module", "*"), row["was"], row["is"])
        for check, rows in yaml.safe_load(file).items()
        for row in rows
    ]


@pytest.mark.parametrize("name", CHECKS)
def test_the_true_source_passes(name: str) -> None:
    assert max(errors(CHECKS[name](true_modules))) < TOLERANCE


@pytest.mark.parametrize(("check", "module", "was", "now"), MUTANTS)
def test_a_mutant_fails(check: str, module: str, was: str, now: str, tmp_path: Path) -> None:
    wanted = FUSED if check in ("whole_layer", "dropped_layer") else (check,)
    load = loaded_afresh(write_mutant(module, was, now, tmp_path), wanted)
    with np.errstate(all="ignore"):  # a mutant may compute with memory that nobody has written
        assert any(error > 20 * TOLERANCE for error in errors(CHECKS[check](load)))
