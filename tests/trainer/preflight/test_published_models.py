"""Preflight says before a GPU is asked for what of a published checkpoint trains, is copied, and is decoded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from finetune_api.gpus import ExpectedGpu
from finetune_api.run_config import RunConfig
from finetune_test_models.published.multimodal_models import make_multimodal_model
from finetune_test_models.published.packed_models import write_fp8, write_mxfp4
from finetune_trainer.job.settings import Settings
from finetune_trainer.preflight.checks import run_preflight
from finetune_trainer.preflight.table import facts

Build = Callable[..., RunConfig]
CALL = {"role": "assistant", "content": "a dog"}


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "qwen3_vl_moe"])
def test_what_is_copied_is_said_with_its_size(
    name: str, run_config: Build, settings: Settings, tmp_path: Path, texts: list[str]
) -> None:
    folder = make_multimodal_model(name, tmp_path / "base", texts)
    config = run_config(model={"source": f"file://{folder}"}, export={"merged": "BF16", "gguf": ["F16"]})
    report, written = run_preflight(config, settings)
    assert report.errors() == ()
    size = {"gemma3": "0.2 MiB", "qwen2_5_vl": "0.5 MiB", "qwen3_vl_moe": "0.7 MiB"}[name]
    said = (
        f"this model also reads images; its language model trains on text, and the rest ({size}) is copied unchanged; "
        "GGUF files hold the language model alone"
    )
    assert dict(facts(report))["weights"] == said
    assert said in Path(written[0]).read_text()
    assert report.coverage is not None
    routers = 0.003 if name == "qwen3_vl_moe" else 0.0
    assert report.coverage.adapted_share >= 1.0 - routers, "towers are no part of what could train"


def test_a_mixture_whose_layers_differ_is_planned_with_fused_layers(
    run_config: Build, settings: Settings, tmp_path: Path, texts: list[str]
) -> None:
    """As Gemma 4 26B-A4B, whose full layers have other numbers of heads than its configuration says for all."""
    heads = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    folder = make_multimodal_model("gemma4_moe", tmp_path / "base", texts, **heads)
    card = ExpectedGpu(name="card", memory_bytes=24 << 30, teraflops=200)
    config = run_config(model={"source": f"file://{folder}"}, export={"merged": "BF16", "gguf": ["F16"]})
    report, _ = run_preflight(config.model_copy(update={"gpu": card, "gpus": 1}), settings)

    assert report.errors() == ()
    assert report.coverage is not None
    assert report.coverage.expert_share > 0.1
    assert min(report.coverage.adapted_share, report.coverage.quantized_share) > 0.995, "all but the routers"
    assert report.gpu is not None
    assert next(row.value for row in report.gpu.plan if row.name == "layers") == "2 save all"


@pytest.mark.parametrize("is_readable", [True, False])
def test_experts_in_an_order_that_nothing_reads_are_refused(
    is_readable: bool, run_config: Build, settings: Settings, tmp_path: Path, texts: list[str]
) -> None:
    folder = make_multimodal_model("qwen3_vl_moe", tmp_path / "base", texts)
    file = folder / "model.safetensors"
    stored = load_file(file)
    if not is_readable:
        name = "model.language_model.layers.0.mlp.experts.down_proj"
        stored[name] = stored[name].transpose(1, 2).contiguous()
    save_file(stored, file, metadata={"format": "pt"})

    report, _ = run_preflight(run_config(model={"source": f"file://{folder}"}), settings)
    said = [error.message for error in report.errors() if error.location == "spec.model.source"]
    assert len(said) == (0 if is_readable else 1)
    assert all("or both with their last two sizes swapped: get the files again" in each for each in said)


def test_the_chat_template_may_lie_beside_the_processor(
    run_config: Build, settings: Settings, tmp_path: Path, texts: list[str]
) -> None:
    folder = make_multimodal_model("gemma3", tmp_path / "base", texts)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = run_config(model={"source": f"file://{folder}"})
    without, _ = run_preflight(config, settings)
    assert "chat template" in without.errors()[0].message
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert run_preflight(config, settings)[0].errors() == ()


@pytest.mark.parametrize("method", ["FP8", "MXFP4"])
def test_what_is_decoded_is_said_with_its_size(
    method: str, run_config: Build, settings: Settings, tmp_path: Path, tiny_base: Path, texts: list[str]
) -> None:
    if method == "FP8":
        write_fp8(tiny_base, tmp_path / "base", block=128)
    else:
        write_mxfp4(tmp_path / "base", texts)
    config = run_config(model={"source": f"file://{tmp_path / 'base'}"}, export={"merged": "BF16", "gguf": []})
    report, _ = run_preflight(config, settings)
    assert report.errors() == ()
    said = dict(facts(report))["weights"]
    assert said.startswith(f"its weights are published in {method}: they are decoded tensor by tensor, and merged")
    whole, _ = run_preflight(run_config(), settings)
    assert method == "MXFP4" or report.coverage == whole.coverage, "coverage is that of the model in 16 bits"


def test_formats_that_nothing_decodes_are_refused_with_those_that_are(
    run_config: Build, settings: Settings, tmp_path: Path, tiny_base: Path
) -> None:
    write_fp8(tiny_base, tmp_path / "base", block=128)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    report, _ = run_preflight(run_config(model={"source": f"file://{path.parent}"}), settings)
    assert "awq-quantised, and only 16-bit, bitsandbytes, FP8 and MXFP4 weights are read" in report.errors()[0].message


AS_TEXT = (
    "messages[0].content has a part of type 'image', but models are trained on text alone: replace it by "
    '{"type": "text", "text": "..."} that says what it shows, or leave the row out'
)
WITHOUT_COLUMN = (
    "the row has content in column images, but models are trained on text alone: leave such rows out "
    "(spec.dataset.onBadRow: Skip does), or write what is to be seen or heard into the text, and remove the column"
)
ROWS_WITH_IMAGES: dict[str, tuple[dict[str, object], str]] = {
    "a part": ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}, CALL]}, AS_TEXT),
    "a column": (
        {"messages": [{"role": "user", "content": "what is it?"}, CALL], "images": [{"bytes": "x"}]},
        WITHOUT_COLUMN,
    ),
    "a file's name": (
        {"messages": [{"role": "user", "content": "<image>\nwhat is it?"}, CALL], "image": "000/1.jpg"},
        "the row has content in column image, but",
    ),
}


@pytest.mark.parametrize(("row", "said"), ROWS_WITH_IMAGES.values(), ids=ROWS_WITH_IMAGES)
def test_rows_with_images_are_refused_by_line(
    row: dict[str, object], said: str, run_config: Build, settings: Settings, tmp_path: Path
) -> None:
    text = {"messages": [{"role": "user", "content": "what is it?"}, CALL], "images": [], "image": None}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(text) + "\n" + json.dumps(row) + "\n")
    report, _ = run_preflight(run_config(dataset={"source": f"file://{rows}"}), settings)
    (error,) = report.errors()
    assert (error.location, error.message.startswith(said)) == ("rows.jsonl:2", True), error.message
