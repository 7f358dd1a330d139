"""Every primitive with a kernel exports its formula as `reference`; none has a gradient of its own."""

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch
import triton

from finetune_kernels import primitives
from finetune_kernels.primitives import attention, byte_products, grouped

FOLDERS: dict[str, ModuleType] = {
    "": primitives, "attention.": attention, "byte_products.": byte_products, "grouped.": grouped,
}  # fmt: skip
NAMES = [
    prefix + module.name
    for prefix, folder in FOLDERS.items()
    for module in pkgutil.iter_modules(folder.__path__)
    if not module.ispkg
]
WITH_KERNELS = (
    "adapter_dropout", "gather_rows", "grouped.low_rank", "grouped.token_sums", "head_norm", "nf4",
    "byte_products.byte_rows", "byte_products.int8", "byte_products.nf4_bytes",
)  # fmt: skip
PARTS = ("rotary_pairs",)
"""Parts of an operation's kernels; the operation has the formula."""
PUBLIC = {
    "adapter_dropout": ("drop", "add_lora_dx"),
    **{f"attention.{name}": ("forward", "backward") for name in ("batched", "cpu", "efficient", "flash", "flash4")},
    "attention.cudnn_cards": ("is_faster",),
    "attention.halves": ("forward_in_two", "backward_in_two"),
    "attention.inputs": ("Qkv", "PackedSequences", "AttentionParams"),
    "attention.pass_counts": ("PassCounts", "PassesByEnds"),
    "attention.reference": ("reference", "reference_backward"),
    "dora": ("row_norms", "magnitude_gradient"),
    "byte_products.byte_rows": ("quantize_rows",),
    "byte_products.fp8": ("product", "Fp8Weight"),
    "byte_products.int8": ("product", "rescale"),
    "byte_products.nf4_bytes": ("decode", "row_scales"),
    "expert_projection": ("Projection", "Rows"),
    "gather_rows": ("gather_rows",),
    "grouped.low_rank": ("shrink", "expand", "outer"),
    "grouped.products": ("linear", "backward"),
    "grouped.token_sums": ("combine", "weigh"),
    "head_norm": ("HeadNorm",),
    "lora_delta": ("LoraDelta",),
    "master_weights": ("master_weight", "set_master_weight", "split_off_master"),
    "multi_tensor_adamw": ("MultiTensorAdamW",),
    "nf4": ("dequantize", "dequantize_stack"),
    "nf4_stack": ("Nf4Stack",),
    "pinned_memory": ("pinned_pieces", "copy_to_pieces", "copy_from_pieces"),
    "precision": ("widen",),
    "rotary_pairs": (),
}


def problems(module: ModuleType) -> list[str]:
    """Breaches of the folder's rules."""
    values = list(vars(module).values())
    found = []
    if _has_kernel(values) and not inspect.isfunction(vars(module).get("reference")):
        found.append("a kernel without a reference")
    if any(inspect.isclass(value) and issubclass(value, torch.autograd.Function) for value in values):
        found.append("an operation: it belongs to ops")
    return found


def _has_kernel(values: list[object]) -> bool:
    kinds = (triton.runtime.JITFunction, triton.runtime.interpreter.InterpretedFunction)
    return any(isinstance(value, kinds) for value in values)


@pytest.mark.parametrize("name", NAMES)
def test_a_primitive_keeps_the_rules_of_its_folder(name: str) -> None:
    module = importlib.import_module(f"finetune_kernels.primitives.{name}")
    assert problems(module) == (["a kernel without a reference"] if name in PARTS else [])
    assert _has_kernel(list(vars(module).values())) == (name in (*WITH_KERNELS, *PARTS))
    assert all(callable(getattr(module, part)) for part in PUBLIC[name])


def test_the_folders_list_their_modules() -> None:
    listed = {
        prefix + line.split()[0].removesuffix(".py"): line
        for prefix, folder in FOLDERS.items()
        for line in (folder.__doc__ or "").splitlines()
        if "  " in line
    }
    assert set(listed) == {*NAMES, *(prefix.rstrip(".") for prefix in FOLDERS if prefix)}
    assert set(NAMES) == set(PUBLIC)
    for name in (*WITH_KERNELS, "byte_products.fp8", "dora", "multi_tensor_adamw", "precision"):
        assert all(f"`{part}`" in listed[name] for part in PUBLIC[name]), name


def test_a_kernel_without_a_reference_is_noticed() -> None:
    module = ModuleType("nf4")
    vars(module).update(vars(importlib.import_module("finetune_kernels.primitives.nf4")))
    assert problems(module) == []
    del vars(module)["reference"]
    assert problems(module) == ["a kernel without a reference"]
    vars(module)["Function"] = type("Function", (torch.autograd.Function,), {})
    assert len(problems(module)) == 2
