"""Whether an adapter can be merged: files alone tell what the trainer finds in the loaded model.

A sample of the types; `make architectures` asks them all.
"""

from pathlib import Path

import pytest

from finetune_api.spec.training import ALL_LINEAR, DEFAULT_TARGETS
from finetune_test_models.sweeps.architecture_sweep import types
from finetune_test_models.sweeps.merge_sweep import ask, write_model
from finetune_trainer.export.errors import InvalidAdapterError, InvalidBaseError
from finetune_trainer.export.planned_merge import UNMERGEABLE, check_stored_types, check_targets
from finetune_trainer.model.safetensors_header import NF4_STATE, TensorHeader

ALL = (ALL_LINEAR,)
MERGEABLE: dict[str, tuple[str, tuple[str, ...]]] = {
    "a plain decoder": ("llama", ALL),
    "experts beside which nothing has a barred name": ("mixtral", ALL),
    "experts in matrices of their own": ("qwen3_moe", ALL),
    "default targets beside renamed layers": ("kimi_linear", DEFAULT_TARGETS),
    "a renamed prefix": ("nemotron_h", ALL),
}
REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "a renamed layer": ("kimi_linear", ALL),
    "a block that layers share": ("zamba2", DEFAULT_TARGETS),
    "weights as [in, out]": ("gpt2", ALL),
}


def header(name: str, dtype: str = "BF16") -> TensorHeader:
    return TensorHeader(name, dtype, (8, 8), "model.safetensors", 0, 128)


@pytest.mark.filterwarnings("ignore")  # families warn of kernels that are not installed
@pytest.mark.parametrize("case", [*MERGEABLE, *REFUSED])
def test_files_tell_what_the_loaded_model_says(case: str, tmp_path: Path) -> None:
    model_type, targets = (MERGEABLE | REFUSED)[case]
    write_model(model_type, tmp_path)
    answer = ask(model_type, tmp_path, targets)
    assert answer is not None
    assert answer.agrees, answer
    assert (answer.preflight is not None) == (case in REFUSED)


def test_the_table_names_only_types_that_exist() -> None:
    assert set(types()) >= UNMERGEABLE.keys()


def test_the_error_names_the_layers_that_are_left() -> None:
    headers = [header(f"model.layers.0.self_attn.{name}.weight") for name in ("f_a_proj", "q_proj", "o_proj")]
    with pytest.raises(InvalidAdapterError) as found:
        check_targets("kimi_linear", ("q_proj", "f_a_proj"), headers)
    assert found.value.message == (
        "adapters on f_a_proj of a kimi_linear model cannot be merged, as its files hold these layers under another "
        "name or in another order: write targetModules: [q_proj], or to train the adapter alone, write "
        "export: {merged: None, gguf: []}"
    )
    check_targets("kimi_linear", ("q_proj",), headers)
    with pytest.raises(InvalidAdapterError, match=r"write targetModules: \[o_proj, q_proj\]"):
        check_targets("kimi_linear", ALL, headers)
    with pytest.raises(InvalidAdapterError, match=r"another order: to train the adapter alone"):
        check_targets("kimi_linear", ALL, None)


def test_layers_without_the_models_prefix_are_seen() -> None:
    with pytest.raises(InvalidAdapterError, match=r"without the model's prefix \(h\.0\.mlp\.dense_h_to_4h\)"):
        check_targets("bloom", ALL, [header("h.0.mlp.dense_h_to_4h.weight")])


@pytest.mark.parametrize(("dtype", "name"), [("BOOL", "mask"), ("U8", "mask"), ("I64", "positions"), ("F8_E4M3", "x")])
def test_a_type_that_no_export_reads_is_seen(dtype: str, name: str) -> None:
    weight = "model.layers.0.self_attn.q_proj.weight"
    packed = [header(weight, "U8"), header(f"{weight}.absmax", "U8"), header(f"{weight}{NF4_STATE}", "U8")]
    check_stored_types([header("norm.weight", "F32"), *packed])
    with pytest.raises(InvalidBaseError, match=f"layers.0.{name} in model.safetensors is stored as {dtype}, .*alone"):
        check_stored_types([*packed, header(f"layers.0.{name}", dtype)])
