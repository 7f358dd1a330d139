"""The language model of a checkpoint that also reads images computes on text what the whole checkpoint computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.gemma3n import modeling_gemma3n

from finetune_test_models.published.multimodal_models import MULTIMODAL, make_multimodal_model
from finetune_trainer.export.base_model.causal_model import load_causal_model
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.model.configuration.reading import read_published_config
from finetune_trainer.model.multimodal import (
    LANGUAGE_MODEL_AT,
    language_model_names,
    name_in_checkpoint,
    name_in_language_model,
)

TOKENS = torch.arange(3, 83).unsqueeze(0)


@pytest.fixture
def no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n without the package of its tower, which text does not reach."""
    build = modeling_gemma3n.AutoModel.from_config

    def build_other(config: Any, **named: Any) -> Any:
        return torch.nn.Identity() if config.model_type == "gemma3n_vision" else build(config, **named)

    monkeypatch.setattr(modeling_gemma3n.AutoModel, "from_config", build_other)


def test_every_row_of_the_table_is_compared() -> None:
    assert {model_type for model_type, *_ in MULTIMODAL.values()} == LANGUAGE_MODEL_AT.keys()


@pytest.mark.usefixtures("no_timm")
@pytest.mark.parametrize("name", MULTIMODAL)
@torch.no_grad()
def test_logits_on_text_are_those_of_the_whole(name: str, tmp_path: Path, texts: list[str]) -> None:
    folder = make_multimodal_model(name, tmp_path / name, texts)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    base = open_base_model(folder)
    alone, missing = load_causal_model(base, torch.device("cpu"), torch.float32)
    assert not missing
    expected = whole(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    assert expected.std() > 0.1
    assert torch.equal(alone.eval()(TOKENS).logits, expected)

    # The names by which adapters are published are those of the whole checkpoint's own modules.
    modules, model_type = dict(whole.named_modules()), whole.config.model_type
    for module, kind in alone.named_modules():
        if isinstance(kind, torch.nn.Linear):
            published = name_in_checkpoint(model_type, module)
            assert published in modules, published
            assert name_in_language_model(published) == module


def test_an_outer_id_of_no_token_is_not_the_language_models(tmp_path: Path, texts: list[str]) -> None:
    folder = make_multimodal_model("smolvlm", tmp_path / "smolvlm", texts)
    written = json.loads((folder / "config.json").read_text())
    for outer, expected in ((128_002, 5), (7, 7)):
        written |= {"pad_token_id": outer, "text_config": written["text_config"] | {"pad_token_id": 5}}
        (folder / "config.json").write_text(json.dumps(written))
        assert read_published_config(folder).pad_token_id == expected
        assert load_causal_model(open_base_model(folder), torch.device("cpu"), torch.float32)


def test_towers_are_no_part_of_the_language_model() -> None:
    prefixed = [
        "language_model.model.norm.weight",
        "vision_tower.layers.0.norm.weight",
        "language_model.lm_head.weight",
    ]
    assert language_model_names(prefixed) == {prefixed[0]: "model.norm.weight", prefixed[2]: "lm_head.weight"}
    older = ["model.layers.0.mlp.up_proj.weight", "visual.blocks.0.mlp.up_proj.weight", "lm_head.weight"]
    assert language_model_names(older) == {older[0]: older[0], older[2]: older[2]}
