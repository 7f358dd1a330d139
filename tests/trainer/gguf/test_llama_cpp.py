"""llama.cpp itself judges: from our F32 file of every family it says, greedily, exactly what transformers says.

The weights are random, so that a wrong conversion changes every answer (a trained tiny model says the same to
anything).
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_devcluster.generation import banned_tokens, complete
from finetune_devcluster.tiny_model import FAMILIES, make_tiny_model
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.gguf import tensors

PROMPTS = [[3 + (7 * number + 13 * place) % 400 for place in range(4 + number)] for number in range(10)]
TOKENS = 16


def exported(base: Path, output: Path, kind: str = "F32") -> Path:
    request = ExportRequest(base=base, adapter=None, output=output, merged=None, gguf=(kind,), name="model")
    (file,) = export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
    return file.path


def continued_by_transformers(base: Path) -> list[list[int]]:
    banned = banned_tokens(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    answers = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(TOKENS):
                logits = model(tokens, use_cache=False).logits[0, -1]
                tokens = torch.cat([tokens, _best(logits, banned)], dim=1)
        answers.append(tokens[0, len(prompt) :].tolist())
    return answers


def _best(logits: torch.Tensor, banned: list[int]) -> torch.Tensor:
    logits[banned] = -torch.inf
    return logits.argmax().view(1, 1)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp(request.param), family=request.param, texts=texts)


def test_the_f32_file_says_what_transformers_says(base: Path, tmp_path: Path) -> None:
    expected = continued_by_transformers(base)
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS), "the answers do not tell prompts apart"
    assert complete(exported(base, tmp_path), PROMPTS, tokens=TOKENS, banned=banned_tokens(base)) == expected


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_smaller_types_load_and_mostly_agree(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """Random weights have near ties, so some answers may differ; the first token of most prompts does not."""
    expected = continued_by_transformers(tiny_base)
    found = complete(exported(tiny_base, tmp_path, kind), PROMPTS, tokens=TOKENS, banned=banned_tokens(tiny_base))
    assert sum(ours[0] == theirs[0] for ours, theirs in zip(found, expected, strict=True)) >= len(PROMPTS) - 1


def test_without_the_rotary_order_of_llama_the_answers_differ(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "interleave_heads", lambda weights, heads: weights)
    found = complete(exported(tiny_base, tmp_path), PROMPTS, tokens=TOKENS, banned=banned_tokens(tiny_base))
    assert found != continued_by_transformers(tiny_base)
