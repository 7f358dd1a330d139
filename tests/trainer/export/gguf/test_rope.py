"""RoPE scaling with settings of its own: what llama.cpp says from our file is what transformers says; where its
converter writes something else, what it says from that file is not.

llama.cpp computes YaRN's sharpening of attention itself, from the factor alone, and multiplies it with
`rope.scaling.attn_factor`. The converter puts a given factor into `rope.scaling.yarn_attn_factor`, which llama.cpp
overwrites, and leaves out `mscale`; for longrope it always computes the factor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_test_models.family_models import FAMILY_MODELS, make_family_model
from finetune_test_programs.generation import banned_tokens, log_probabilities
from finetune_test_programs.llama_cpp_converter import Conversion, convert

PROMPTS = [[3 + (7 * number + 13 * place) % 400 for place in range(110)] for number in range(3)]
LONG_PROMPTS = [[3 + (7 * number + 13 * place) % 400 for place in range(600)] for number in range(2)]
# As in test_llama_cpp: fp32 on both sides differs by at most 5.2e-5.
FP32_DIFFERENCE, HEARD = 1e-4, 1e-3


@dataclass(frozen=True)
class Scaling:
    """A family's model with these RoPE parameters besides its own."""

    name: str
    family: str
    parameters: dict[str, Any]
    theirs_is_right: bool = False


SCALINGS = [
    Scaling("yarn as usual", "qwen2.5-yarn", {}, theirs_is_right=True),
    Scaling("yarn with attention_factor", "qwen2.5-yarn", {"attention_factor": 0.7}),
    Scaling("yarn with mscale", "qwen2.5-yarn", {"mscale": 0.9, "mscale_all_dim": 0.4}),
    Scaling("yarn with mscale that cancels", "qwen2.5-yarn", {"mscale": 1.0, "mscale_all_dim": 1.0}),
    Scaling("longrope as usual", "phi-3-long", {}, theirs_is_right=True),
    Scaling("longrope with attention_factor", "phi-3-long", {"attention_factor": 1.6}),
    Scaling("longrope with factor", "phi-3-long", {"factor": 16.0}),
]


@dataclass(frozen=True)
class Files:
    base: Path
    ours: Path
    theirs: Path


@pytest.fixture(scope="module")
def files(
    texts: list[str], export_gguf: Callable[..., dict[str, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Files]:
    """F32 files by the scaling's name; llama.cpp's are written by one process."""
    folder = tmp_path_factory.mktemp("scalings")
    made = {}

    for scaling in SCALINGS:
        place = folder / scaling.name.replace(" ", "-")
        own = FAMILY_MODELS[scaling.family].settings["rope_parameters"]
        base = make_family_model(scaling.family, place / "base", texts, rope_parameters=own | scaling.parameters)
        made[scaling.name] = Files(base, export_gguf(base, place, "F32")["F32"], place / "theirs.gguf")

    pre_tokenizers = {"qwen2.5-yarn": "qwen2", "phi-3-long": "default"}
    convert(
        [
            Conversion(
                str(made[each.name].base), str(made[each.name].theirs), "f32", "tiny", pre_tokenizers[each.family]
            )
            for each in SCALINGS
        ]
    )
    return made


@torch.no_grad()
def difference(file: Path, base: Path, prompts: list[list[int]], context: int) -> float:
    """Largest one between log-probabilities by llama.cpp and by transformers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    expected = model(torch.tensor(prompts)).logits[:, -1].log_softmax(-1)
    banned = banned_tokens(base)
    found = log_probabilities(file, prompts, size=expected.shape[1], banned=banned, context=context)
    return float((torch.tensor(found) - expected).abs().max())


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.name)
def test_ours_says_what_transformers_says(scaling: Scaling, files: dict[str, Files]) -> None:
    made = files[scaling.name]
    assert difference(made.ours, made.base, PROMPTS, 512) < FP32_DIFFERENCE
    if scaling.family == "phi-3-long":
        assert difference(made.ours, made.base, LONG_PROMPTS, 1024) < FP32_DIFFERENCE
    theirs = difference(made.theirs, made.base, PROMPTS, 512)
    assert theirs < FP32_DIFFERENCE if scaling.theirs_is_right else theirs > HEARD


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.name)
def test_nothing_else_differs_from_the_converters_scaling(scaling: Scaling, files: dict[str, Files]) -> None:
    def scalings(path: Path) -> dict[str, Any]:
        fields = gguf.GGUFReader(path).fields
        found = {key.split(".", 1)[1]: field.contents() for key, field in fields.items() if ".rope." in key}
        return {key: value for key, value in found.items() if not key.endswith("attn_factor")}

    ours = scalings(files[scaling.name].ours)
    assert ours == scalings(files[scaling.name].theirs)
    assert ours["rope.scaling.original_context_length"] == 512
