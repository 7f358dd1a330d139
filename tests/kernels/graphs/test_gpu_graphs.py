"""Real CUDA graphs of decoder layers: equal to the bit to layers that are launched kernel by kernel, in every pass.

`-s` prints the host's time for a pass of each.
"""

import time
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_kernels.experts.replacing import replace_experts
from finetune_kernels.graphs.host_pace import HostPace
from finetune_kernels.graphs.layer_graphs import EAGER_PASSES, LayerGraphs
from finetune_kernels.graphs.recorder import GraphRecorder
from finetune_kernels.graphs.trial import GpuPassTimes
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_test_kernels.rerun_recorder import Clock, Waiting
from finetune_test_kernels.small_layers import LINEARS
from finetune_test_kernels.tensor_checks import root_error

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
LAYERS = 6
SIZES = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 512, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
GEMMA4 = {
    "enable_moe_block": True, "num_experts": 16, "top_k_experts": 2, "moe_intermediate_size": 512,
    "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 2, "global_head_dim": 512,
    "sliding_window": 100,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], ActivationPolicy]] = {
    "llama": ("llama", {}, ActivationPolicy.SAVE_ALL),
    "llama, MLP again": ("llama", {}, ActivationPolicy.RECOMPUTE_MLP),
    "llama, all again": ("llama", {}, ActivationPolicy.RECOMPUTE_ALL),
    "qwen3": ("qwen3", {}, ActivationPolicy.SAVE_ALL),
    "gemma2": ("gemma2", {"head_dim": 256, "sliding_window": 100}, ActivationPolicy.SAVE_ALL),
    "experts": ("qwen3_moe", EXPERTS, ActivationPolicy.SAVE_ALL),
    "experts beside an MLP": ("gemma4_text", GEMMA4, ActivationPolicy.SAVE_ALL),
}
# Documents of one shape. Of equal lengths cuDNN's kernel takes them from the third pass on, of others FlashAttention.
EQUAL = [(256, 256)] * 6
MIXED = [(256, 100, 156), (100, 256, 156), (156, 100, 256), (256, 156, 100), (100, 156, 256), (156, 256, 100)]

# Packs that one recording takes: 961 to 1,024 tokens in two or three documents, the longest of more than 512.
PACKS = [(600, 400), (520, 300, 190), (700, 270), (600, 424), (513, 448), (900, 60, 11)]


def build(case: str, *, fp8: bool = False) -> tuple[Any, FusedLayers]:
    """A model in bf16 on the GPU, whose layers are fused."""
    kind, settings, policy = CASES[case]
    torch.manual_seed(0)
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | settings), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    replace_experts(base)
    model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS)).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    causal = model.get_base_model()
    layers = FusedLayers(causal, [policy] * LAYERS, torch.bfloat16, keep_dequantized=True)
    if fp8:
        assert layers.use_fp8() == 1
    return model, layers


def graphs() -> LayerGraphs:
    """Graphs of every pass whose shape comes again."""
    return LayerGraphs(lambda: GraphRecorder(torch.device("cuda")), lambda: True, Waiting(), Clock())


def passes(model: Any, documents: list[tuple[int, ...]]) -> list[list[torch.Tensor]]:
    """Logits and gradients of each pass, with tokens of its own; adapters change between them."""
    weights = [value for value in model.parameters() if value.requires_grad]
    found = []
    for number, lengths in enumerate(documents):
        generator = torch.Generator("cuda").manual_seed(number)
        tokens = torch.randint(3, 512, (1, sum(lengths)), generator=generator, device="cuda")
        ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
        longest = max(lengths)
        bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        positions = torch.cat([torch.arange(length, device="cuda") for length in lengths])[None]
        logits = model.get_base_model()(input_ids=tokens, position_ids=positions, use_cache=False, **bounds).logits

        d_logits = torch.randn(logits.shape, generator=generator, device="cuda").to(logits.dtype)
        gradients = torch.autograd.grad(logits, weights, d_logits)
        found.append([logits.detach(), *map(torch.clone, gradients)])
        with torch.no_grad():
            torch._foreach_mul_(weights, 0.9)
    return found


@pytest.mark.parametrize("documents", [EQUAL, MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize("case", CASES)
def test_passes_are_equal_to_the_bit(case: str, documents: list[tuple[int, ...]]) -> None:
    assert_equal(case, documents, fp8=False)


@pytest.mark.parametrize("case", ["llama", "llama, all again", "gemma2", "experts"])
def test_packs_of_about_one_size_share_a_recording(case: str) -> None:
    """More rows are other products: their errors are those of rounding, in the whole and not in each number."""
    expected = passes(build(case)[0], PACKS)
    model, layers = build(case)
    layers.use_graphs(graphs())
    found = passes(model, PACKS)

    assert layers._recorded is not None
    assert not layers._recorded.has_failed
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        for place, (ours, theirs) in enumerate(zip(one, other, strict=True)):
            assert ours.isfinite().all(), (number, place)
            assert root_error(ours, theirs.float()) < 0.02, (number, place)


def test_passes_in_fp8_are_equal_to_the_bit() -> None:
    assert_equal("llama", EQUAL, fp8=True)


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest absolute difference of two tensors."""
    return float((one.float() - other.float()).abs().max())


def assert_equal(case: str, documents: list[tuple[int, ...]], *, fp8: bool) -> None:
    """Compares graphs with kernels, and kernels with themselves: what sums in any order cannot be equal."""
    expected, again = (passes(build(case, fp8=fp8)[0], documents) for _ in range(2))
    model, layers = build(case, fp8=fp8)
    layers.use_graphs(graphs())
    found = passes(model, documents)

    assert layers._graphs is not None
    assert layers._recorded is not None, "the last pass was launched as graphs"
    assert not layers._recorded.has_failed
    assert len(layers._recorded.layers) == LAYERS
    # What is summed in any order differs now and then, by a unit in the last place: the noise is that of all passes.
    each = [list(map(largest_difference, one, other)) for one, other in zip(expected, again, strict=True)]
    noise = [max(of_place) for of_place in zip(*each, strict=True)]
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        for place, (ours, theirs) in enumerate(zip(one, other, strict=True)):
            assert ours.isfinite().all()
            assert largest_difference(ours, theirs) <= 4 * noise[place], (number, place)
    assert not torch.equal(found[EAGER_PASSES][0], found[-1][0]), "each pass has tokens of its own"


def test_memory_is_given_back() -> None:
    model, layers = build("llama")
    passes(model, EQUAL[:1])
    before = torch.cuda.memory_allocated()
    layers.use_graphs(graphs())
    passes(model, EQUAL)
    assert torch.cuda.memory_allocated() > before
    assert layers.drop_graphs()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20
    passes(model, EQUAL)


@pytest.mark.parametrize("case", ["llama", "experts"])
def test_the_host_is_free_sooner(case: str) -> None:
    model, layers = build(case)
    times = {}
    for kind in ("kernels", "graphs"):
        if kind == "graphs":
            layers.use_graphs(graphs())
        passes(model, MIXED)
        torch.cuda.synchronize()
        start = time.perf_counter()
        passes(model, MIXED * 3)
        times[kind] = (time.perf_counter() - start) / len(MIXED * 3)
        torch.cuda.synchronize()
    print(f"\n{case}: the host's time for a pass of {LAYERS} layers: {times}")
    assert times["graphs"] < 0.7 * times["kernels"]


def test_graphs_of_a_host_that_is_slower_are_found_to_be_faster_by_the_clock_of_the_gpu() -> None:
    model, layers = build("experts")
    recorder = lambda: GraphRecorder(torch.device("cuda"))  # noqa: E731
    found = LayerGraphs(recorder, lambda: True, HostPace(), GpuPassTimes())
    layers.use_graphs(found)
    passes(model, PACKS * 4)
    (trial,) = [one for one in found._trials.values() if one.is_over]
    print(f"\n{trial.gain:.2f} times as fast as graphs")
    assert trial.gain > 1.2
    assert found.has_some


@pytest.mark.parametrize(("rows", "waits"), [(8, True), (1 << 15, False)])
def test_a_gpu_waits_for_the_host_in_small_passes_alone(rows: int, waits: bool) -> None:
    """Some products of a microsecond, or of milliseconds, are a layer."""
    factor, pace = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16), HostPace()
    for number in range(3):
        x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
        for left in reversed(range(24)):
            for _ in range(6):
                x = x @ factor
            pace.launched(left)
        assert number == 0 or pace.gpu_waits is waits, number
