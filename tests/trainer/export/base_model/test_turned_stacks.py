"""Stacks of experts whose rows and columns are swapped in files (Qwen3-VL's mixtures, as published) are read in the
model's order, whichever the files have, and written back as they were; an order that is not known is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from finetune_test_models.published.multimodal_models import make_multimodal_model, turn_stored_stacks
from finetune_test_programs.transformers_4 import load_and_save
from finetune_trainer.export.base_model.causal_model import load_causal_model
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.base_model.language_model import TurnedTensor
from finetune_trainer.export.base_model.packed_tensors import decode_fp8
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.model.published_weights import published_below

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 43).unsqueeze(0)
FILE = "model.safetensors"
HIDDEN = 256
WIDTHS = {"as published": 64, "square gate and up": HIDDEN // 2, "square down": HIDDEN}
"""Width of each expert beside a hidden size of 256. Where gate and up or down are square, no shape of theirs tells the
order, and transformers takes them for its own."""
EXPERTS = "model.language_model.layers.1.mlp.experts"
Stored = dict[str, torch.Tensor]


def make_pair(folder: Path, texts: list[str], width: int) -> tuple[Path, Path]:
    """The same model as transformers 5 saves it, and as it is published."""
    saved, published = (
        make_multimodal_model("qwen3_vl_moe_resaved", folder / each, texts, moe_intermediate_size=width)
        for each in ("saved", "published")
    )
    turn_stored_stacks(published)
    return saved, published


@torch.no_grad()
def logits_of_transformers(folder: Path) -> torch.Tensor:
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found: torch.Tensor = whole(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    return found


@torch.no_grad()
def our_logits(folder: Path) -> torch.Tensor:
    alone, missing = load_causal_model(open_base_model(folder), CPU, torch.float32)
    assert not missing
    assert all(parameter.is_contiguous() for parameter in alone.parameters()), "kernels take rows one after the other"
    found: torch.Tensor = alone.eval()(TOKENS).logits
    return found


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_both_orders_are_the_same_model(width: int, tmp_path: Path, texts: list[str]) -> None:
    saved, published = make_pair(tmp_path, texts, width)
    expected = logits_of_transformers(saved)
    assert torch.equal(our_logits(saved), expected)
    assert torch.equal(our_logits(published), expected)

    # Square ones in the published order are another model to transformers: the case is none that any reading passes.
    is_square = width != WIDTHS["as published"]
    assert torch.equal(logits_of_transformers(published), expected) != is_square
    turned = [
        {each.name for each in open_base_model(base).tensors if isinstance(each, TurnedTensor)}
        for base in (saved, published)
    ]
    assert [len(names) for names in turned] == [0, 4]
    for base in (saved, published):
        assert {(each.name, each.shape) for each in published_below(base).own} == set(open_base_model(base).shapes)


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_transformers_4_reads_and_saves_the_published_order(width: int, tmp_path: Path, texts: list[str]) -> None:
    """Square ones, too."""
    folder = make_multimodal_model("qwen3_vl_moe", tmp_path / "m", texts, moe_intermediate_size=width)
    found = load_and_save(folder, tmp_path / "saved", TOKENS[0].tolist())
    torch.testing.assert_close(found, our_logits(folder), atol=2e-5, rtol=0)  # 3e-6 was measured
    assert torch.equal(our_logits(tmp_path / "saved"), our_logits(folder))


@pytest.mark.parametrize("merged", ["BF16", "FP16"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_merged_files_have_the_order_of_the_base(width: int, merged: str, tmp_path: Path, texts: list[str]) -> None:
    for base in make_pair(tmp_path, texts, width):
        request = ExportRequest(base, None, tmp_path / f"{base.name}-out", merged=merged, gguf=(), name="m")
        export(request, device=CPU, on_progress=lambda done, total: None)
        before, after = (load_file(folder / FILE) for folder in (base, request.output / "merged"))
        assert before.keys() == after.keys()
        assert all(torch.equal(value.to(after[name].dtype), after[name]) for name, value in before.items())


@pytest.mark.parametrize("written", [False, None])
def test_routers_weights_add_up_to_one_whatever_the_config_says(
    written: bool | None, tmp_path: Path, texts: list[str]
) -> None:
    """transformers' class of the whole does not read `norm_topk_prob`, which Qwen3's mixtures do."""
    changes: dict[str, Any] = {} if written is None else {"norm_topk_prob": written}
    folder = make_multimodal_model("qwen3_vl_moe_resaved", tmp_path / "m", texts, **changes)
    assert open_base_model(folder).full_config["norm_topk_prob"] is True
    assert torch.equal(our_logits(folder), logits_of_transformers(folder))


def test_stacks_in_fp8_are_decoded_and_then_turned(tmp_path: Path, texts: list[str]) -> None:
    folder = make_multimodal_model("qwen3_vl_moe", tmp_path / "m", texts)
    stored, name = load_file(folder / FILE), f"{EXPERTS}.gate_up_proj"
    scale = torch.rand(4, 2, 1) + 0.5  # blocks of 128 x 128
    stored[name] = stored[name].to(torch.float8_e4m3fn)
    save_file(stored | {f"{name}_scale_inv": scale}, folder / FILE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))

    base = open_base_model(folder)
    found = {tensor.name: tensor.read() for tensor in base.tensors}
    expected = decode_fp8(stored[name], scale, (128, 128)).transpose(1, 2)
    assert torch.equal(found["model.layers.1.mlp.experts.gate_up_proj"], expected)
    assert base.packed_formats == ["FP8"]
    assert {(each.name, each.shape) for each in published_below(folder).own} == set(base.shapes)


def _one_order_each(stored: Stored) -> Stored:
    return stored | {f"{EXPERTS}.down_proj": stored[f"{EXPERTS}.down_proj"].transpose(1, 2).contiguous()}


def _without_down(stored: Stored) -> Stored:
    return {name: value for name, value in stored.items() if name != f"{EXPERTS}.down_proj"}


def _one_by_one(stored: Stored) -> Stored:
    down = stored.pop(f"{EXPERTS}.down_proj")
    return stored | {f"{EXPERTS}.{number}.down_proj.weight": each.contiguous() for number, each in enumerate(down)}


REFUSED: dict[str, tuple[Callable[[Stored], Stored], str]] = {
    "one of each order": (
        _one_order_each,
        r"hold down_proj of shape \[4, 256, 64\], gate_up_proj of shape \[4, 256, 128\] in model\.layers\.1\.mlp",
    ),
    "gate and up alone": (_without_down, r"hold gate_up_proj of shape \[4, 256, 128\] in .*, but experts are"),
    "one by one": (_one_by_one, r"hold each expert by itself \(.*down_proj\.weight\), .*: take the one in 16 bits"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_another_order_is_refused(
    change: Callable[[Stored], Stored], said: str, tmp_path: Path, texts: list[str]
) -> None:
    folder = make_multimodal_model("qwen3_vl_moe", tmp_path / "m", texts)
    save_file(change(load_file(folder / FILE)), folder / FILE, metadata={"format": "pt"})
    with pytest.raises(InvalidBaseError, match=said):
        open_base_model(folder)
