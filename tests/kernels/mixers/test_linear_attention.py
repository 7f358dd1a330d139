"""Linear attention where fla is installed: tensors of a CPU go to transformers' loops, those of a GPU to fla's kernels,
with the ends of packed documents. Formulas stand in for the kernels here; `test_gpu_linear_attention.py` runs them."""

import re
import sys
from collections.abc import Callable
from functools import wraps
from inspect import unwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5

from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.mixers import linear_attention
from finetune_kernels.mixers.documents import BatchesOfPass
from finetune_kernels.mixers.isolation import isolate_documents
from finetune_kernels.mixers.linear_attention import CONVOLUTION, DELTA_RULE, RULES, takes_ends
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import FAMILIES
from finetune_test_kernels.family_settings import documents_pass, family_model
from finetune_test_kernels.tensor_checks import DEVICE, largest_error

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="in fp32, by the kernels' formulas"),
    pytest.mark.usefixtures("in_pytorch"),
]
FAMILY = {family.prefix: family for family in FAMILIES if family.mixer}
DOCUMENTS, TOLERANCE = (7, 2, 5), 2e-4  # as in test_families.py
Formula = Callable[..., Any]


def by_document(formula: Formula) -> Formula:
    """The gated delta rule of packed documents [1, T, ...], each by itself."""

    def run(*inputs: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, cu_seqlens: Any = None, **options: Any) -> Any:
        if cu_seqlens is None:
            return formula(*inputs, g=g, beta=beta, **options)
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(value.split(lengths, 1) for value in (*inputs, g, beta)), strict=True)
        return torch.cat([formula(*part[:3], g=part[3], beta=part[4], **options)[0] for part in parts], 1), None

    return run


@pytest.fixture
def modelling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Qwen 3.5's modelling file as it is where fla is installed and there is no GPU: all tensors go to Triton. Its
    functions are put back after the test."""
    file: ModuleType = modeling_qwen3_5
    monkeypatch.setattr(linear_attention, "find_spec", lambda name: object())
    for name in (DELTA_RULE, CONVOLUTION):
        reference = unwrap(getattr(file, name))

        @wraps(reference)
        def kernel(*arguments: Any, **options: Any) -> Any:
            raise RuntimeError("0 active drivers")

        monkeypatch.setattr(file, name, kernel)
    return file


@pytest.fixture
def on_gpu(modelling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Everything taken for a GPU's, and fla's functions by formulas; returns what these were given last."""
    given = dict[str, Any]()
    rule, convolution = (unwrap(getattr(modelling, name)) for name in (DELTA_RULE, CONVOLUTION))

    def delta_rule(
        *inputs: torch.Tensor, g: Any, beta: Any, cu_seqlens: Any = None, use_qk_l2norm_in_kernel: bool = False
    ) -> Any:
        given["rule"] = cu_seqlens
        formula, norms = by_document(rule), use_qk_l2norm_in_kernel
        return formula(*inputs, g=g, beta=beta, cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=norms)

    def convolve(x: torch.Tensor, weight: Any, bias: Any, *, activation: str, cu_seqlens: Any) -> Any:
        given["convolution"] = cu_seqlens
        parts = [x] if cu_seqlens is None else x.split(cu_seqlens.diff().tolist(), 1)
        rows = [convolution(part.transpose(1, 2), weight, bias, activation=activation) for part in parts]
        return torch.cat(rows, 2).transpose(1, 2), None

    def norm(x: torch.Tensor, gate: torch.Tensor, weight: Any, bias: None, activation: str, *, eps: float) -> Any:
        given["norm"] = activation
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps) * torch.nn.functional.silu(gate)

    monkeypatch.setattr(linear_attention, "on_gpu", lambda tensor: True)
    for path, (name, function) in {
        "fla.ops.gated_delta_rule": ("chunk_gated_delta_rule", delta_rule),
        "fla.modules.causal_conv1d": ("causal_conv1d", convolve),
        "fla.modules.norm.fused_norm_gate": ("rms_norm_gated", norm),
    }.items():
        module = ModuleType(path)
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, path, module)
    return given


def test_tensors_of_a_cpu_never_reach_the_kernels(modelling: ModuleType) -> None:
    model = family_model(FAMILY["Qwen3_5"])
    with pytest.raises(RuntimeError, match="active drivers"):
        documents_pass(model, DOCUMENTS, packed=False)

    assert isolate_documents(model.get_base_model()) == 1
    rule = getattr(modelling, DELTA_RULE)
    expected = documents_pass(model, DOCUMENTS, packed=False)
    assert largest_error(documents_pass(model, DOCUMENTS, packed=True), expected) < TOLERANCE
    assert not takes_ends(model.get_base_model().model.layers[0].linear_attn, torch.empty(1))
    isolate_documents(model.get_base_model())
    assert getattr(modelling, DELTA_RULE) is rule


@pytest.mark.parametrize("fused", [True, False])
def test_documents_ends_reach_rule_and_convolution(
    fused: bool, on_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model(FAMILY["Qwen3_5"])
    causal = model.get_base_model()
    isolate_documents(causal)
    if fused:
        FusedLayers(causal, [ActivationPolicy.SAVE_ALL] * 2, torch.float32, keep_dequantized=False)

    expected = documents_pass(model, DOCUMENTS, packed=False)
    assert on_gpu["norm"] == "silu"
    assert on_gpu["rule"] is on_gpu["convolution"] is None
    monkeypatch.setattr(BatchesOfPass, "of", None)  # no padded batches
    assert largest_error(documents_pass(model, DOCUMENTS, packed=True), expected) < TOLERANCE
    assert on_gpu["rule"].tolist() == on_gpu["convolution"].tolist() == [0, 7, 9, 14]


@pytest.mark.parametrize("name", ["rule", "convolution"])
def test_either_without_the_ends_lets_documents_see_each_other(
    name: str, on_gpu: dict[str, Any], modelling: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model(FAMILY["Qwen3_5"])
    isolate_documents(model.get_base_model())
    expected = documents_pass(model, DOCUMENTS, packed=False)

    place, option = {"rule": (DELTA_RULE, "cu_seqlens"), "convolution": (CONVOLUTION, "cu_seq_lens_q")}[name]
    kind = type(getattr(modelling, place))
    monkeypatch.setattr(kind, "__call__", _without(option, kind.__call__))
    assert largest_error(documents_pass(model, DOCUMENTS, packed=True), expected) > 100 * TOLERANCE


def _without(option: str, call: Formula) -> Formula:
    return lambda self, *inputs, **options: call(self, *inputs, **options | {option: None})


def test_a_rule_that_cannot_be_imported_is_an_error_and_not_a_loop(
    on_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 5.17, transformers' loops would run, and mix the documents."""
    model = family_model(FAMILY["Qwen3_5"])
    isolate_documents(model.get_base_model())
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    with pytest.raises(ImportError, match=r"fla\.ops\.gated_delta_rule"):
        documents_pass(model, DOCUMENTS, packed=True)


def test_every_function_that_transformers_takes_from_fla_is_replaced() -> None:
    """By its sources: a new name would run transformers' loops where fla cannot be imported."""
    models = Path(modeling_qwen3_5.__file__).parents[1]
    taken = {
        (function, name)
        for file in models.glob("*/modeling_*.py")
        for name, function in re.findall(r'_with_fallback\("(\w+)", "fla"\)\ndef (\w+)', file.read_text("utf-8"))
    }
    assert taken == {(function, name) for function, (_, name) in RULES.items()}


def test_the_loops_refuse_what_they_would_mix(modelling: ModuleType) -> None:
    isolate_documents(family_model(FAMILY["Qwen3_5"]).get_base_model())
    ends = torch.tensor([0, 2, 3])
    for name, options in ((DELTA_RULE, {"cu_seqlens": ends}), (CONVOLUTION, {"cu_seq_lens_q": ends})):
        with pytest.raises(ValueError, match="does not keep packed documents apart"):
            getattr(modelling, name)(torch.empty(1), torch.empty(1), **options)


def test_nothing_changes_where_fla_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_attention, "find_spec", lambda name: None)
    before = {name: getattr(modeling_qwen3_5, name) for name in (DELTA_RULE, CONVOLUTION)}
    model = family_model(FAMILY["Qwen3_5"])
    isolate_documents(model.get_base_model())
    assert {name: getattr(modeling_qwen3_5, name) for name in before} == before


def test_other_mixers_keep_their_convolution(modelling: ModuleType) -> None:
    model = family_model(FAMILY["Lfm2"])
    isolate_documents(model.get_base_model())
    assert not takes_ends(model.get_base_model().model.layers[0].conv, torch.empty(1))
