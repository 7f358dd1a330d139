"""Layers of hybrids whose mixer is transformers' own module: documents stay apart in it, and backward runs it again as
forward did, or takes the graph that forward kept."""

from typing import Any

import pytest
import torch
from torch import nn

from finetune_kernels.layers.blocks import module_mixer
from finetune_kernels.layers.blocks.attention_block import LayerInputs
from finetune_kernels.layers.blocks.module_mixer import MixerPass, ModuleMixer
from finetune_kernels.layers.blocks.projected_heads import CosSin
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.mixers.documents import BatchesOfPass, DocumentBatches
from finetune_kernels.mixers.isolation import isolate_documents
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import FAMILIES
from finetune_kernels.primitives.attention.inputs import PackedSequences
from finetune_test_kernels.family_settings import FUSED_FAMILIES, documents_pass, family_model, rows_pass
from finetune_test_kernels.tensor_checks import DEVICE, largest_error

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="in fp32, by the kernels' formulas"),
    pytest.mark.usefixtures("in_pytorch"),
]
HYBRIDS = {family.prefix: family for family in FAMILIES if family.mixer}
DOCUMENTS, TOLERANCE = (7, 2, 5), 2e-4  # as in test_families.py


def fuse(model: Any, policy: ActivationPolicy) -> FusedLayers:
    causal = model.get_base_model()
    return FusedLayers(causal, [policy] * len(causal.model.layers), torch.float32, keep_dequantized=False)


@pytest.mark.parametrize(
    ("prefix", "fused"),
    [(row.prefix, fused) for row in HYBRIDS.values() for fused in (True, False) if row in FUSED_FAMILIES or not fused],
)
def test_documents_that_are_not_batched_see_each_other(
    prefix: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model(HYBRIDS[prefix])
    expected = documents_pass(model, DOCUMENTS, packed=False)
    isolate_documents(model.get_base_model())
    if fused:
        fuse(model, ActivationPolicy.SAVE_ALL)
        assert largest_error(documents_pass(model, DOCUMENTS, packed=True), expected) < TOLERANCE, "the control"

    monkeypatch.setattr(BatchesOfPass, "of", lambda _, sequences: DocumentBatches(((1, sequences.tokens),), None))
    assert largest_error(documents_pass(model, DOCUMENTS, packed=True), expected) > 100 * TOLERANCE


def test_only_mixers_are_wrapped_and_only_once() -> None:
    causal = family_model(HYBRIDS["Lfm2"]).get_base_model()
    assert isolate_documents(causal) == 1
    wrapped = causal.model.layers[0].conv.forward
    assert isolate_documents(causal) == 1
    assert causal.model.layers[0].conv.forward is wrapped
    llama = next(family for family in FAMILIES if family.prefix == "Llama")
    assert isolate_documents(family_model(llama).get_base_model()) == 0


def test_a_mamba_mixer_runs_its_output_projection_as_a_module_while_it_trains() -> None:
    causal = family_model(HYBRIDS["FalconH1"]).get_base_model().train()
    mixer, seen = causal.model.layers[0].mamba, list[bool]()
    original = mixer.forward

    def noted(*arguments: Any, **options: Any) -> Any:
        seen.extend([mixer.training, mixer.out_proj.training])
        return original(*arguments, **options)

    mixer.forward = noted
    causal(torch.ones(1, 4, dtype=torch.long))
    assert seen == [True, True], "the control: mamba-ssm's kernel would read the weight"

    isolate_documents(causal)
    causal(torch.ones(1, 4, dtype=torch.long))
    assert seen[2:] == [False, True]
    assert mixer.training


@pytest.mark.parametrize("policy", [ActivationPolicy.SAVE_ALL, ActivationPolicy.OFFLOAD])
def test_backward_drops_what_forward_dropped(policy: ActivationPolicy) -> None:
    model = family_model(HYBRIDS["Qwen3_5"])
    of_mixers = [
        module for name, module in model.named_modules() if hasattr(module, "lora_dropout") and "linear_attn" in name
    ]
    assert len(of_mixers) == 2
    for module in of_mixers:
        module.lora_dropout["default"] = nn.Dropout(0.5)

    def drawn(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return rows_pass(model, 2, 5)

    model.train()
    expected = drawn(1)
    assert largest_error(drawn(2), expected) > 100 * TOLERANCE, "masks count"
    fuse(model, policy)
    assert largest_error(drawn(1), expected) < TOLERANCE


def runs_of_mixers(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], int]:
    """Results of a batch of rows, and how often mixers ran."""
    ran, original = list[int](), ModuleMixer._run

    def noted(mixer: ModuleMixer, n1: torch.Tensor, inputs: Any) -> torch.Tensor:
        ran.append(len(n1))
        return original(mixer, n1, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(ModuleMixer, "_run", noted)
        return rows_pass(model, 2, 5), len(ran)


@pytest.mark.parametrize(
    ("policy", "by_kernels", "runs"),
    [
        (ActivationPolicy.SAVE_ALL, True, 1), (ActivationPolicy.SAVE_ALL, False, 2),
        (ActivationPolicy.RECOMPUTE_MLP, True, 2), (ActivationPolicy.OFFLOAD, True, 2),
    ],
)  # fmt: skip
def test_a_mixer_runs_once_where_its_kernels_run_and_the_layer_saves_all(
    policy: ActivationPolicy, by_kernels: bool, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model(HYBRIDS["Qwen3_5"])
    expected = rows_pass(model, 2, 5)
    fused = fuse(model, policy)
    mixers = sum(isinstance(layer.mixer, ModuleMixer) for layer in fused.layers)
    assert mixers > 0

    monkeypatch.setattr(module_mixer, "takes_ends", lambda module, rows: by_kernels)
    found, ran = runs_of_mixers(model, monkeypatch)
    assert ran == runs * mixers
    assert largest_error(found, expected) < TOLERANCE


def test_a_kept_graph_is_released_by_backward_and_never_made_without_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = family_model(HYBRIDS["Qwen3_5"])
    fuse(model, ActivationPolicy.SAVE_ALL)
    monkeypatch.setattr(module_mixer, "takes_ends", lambda module, rows: True)
    passes, begin = list[MixerPass](), ModuleMixer.begin

    def noted(mixer: ModuleMixer, seed: Any) -> MixerPass:
        passes.append(begin(mixer, seed))
        return passes[-1]

    monkeypatch.setattr(ModuleMixer, "begin", noted)
    rows_pass(model, 2, 5)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert passes
    assert all(one.graph is None for one in passes)


class SavesOutput(nn.Module):
    """exp(w x), whose backward reads its output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.exp(rows * self.weight)


@pytest.mark.parametrize("again", [True, False])
def test_what_a_layer_writes_over_the_output_does_not_reach_backward(
    again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_mixer, "takes_ends", lambda module, rows: True)
    mixer, x = ModuleMixer(None, SavesOutput(), BatchesOfPass()), torch.arange(12.0).view(3, 4) / 12
    inputs = LayerInputs(x, CosSin(x, x), PackedSequences.of_length(3, 1, torch.device("cpu")))
    passed = mixer.begin(None)
    passed.keeps = True

    with torch.no_grad():
        saved, out = mixer.forward(inputs, passed, again=again)
        assert torch.equal(out, torch.exp(x / 2))
        out.zero_()
    dx, (d_weight,) = mixer.backward(torch.ones(3, 4), inputs, saved, passed, residual=torch.zeros(3, 4))
    assert dx is not None
    torch.testing.assert_close(dx, torch.exp(x / 2) / 2)
    torch.testing.assert_close(d_weight, (torch.exp(x / 2) * x).sum(0))


def test_backward_runs_under_the_autocast_of_forward() -> None:
    mixer = ModuleMixer(None, nn.Linear(4, 4), BatchesOfPass())
    with torch.autocast("cpu", torch.bfloat16):
        passed = mixer.begin(None)
    assert not torch.is_autocast_enabled("cpu")
    with torch.no_grad(), passed.again():
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
        assert torch.is_grad_enabled()
    with torch.no_grad(), mixer.begin(None).again():
        assert not torch.is_autocast_enabled("cpu")
