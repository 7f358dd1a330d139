"""llama.cpp itself judges: from our F32 file of every family, its greedy answers are exactly those of transformers.

The weights are random, so that a wrong conversion changes every answer (a trained tiny model gives one answer to every
prompt). Prompts reach beyond the windows of windowed layers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_test_models.family_models import family_params
from finetune_test_models.references.greedy_answers import Expected, said_by_transformers
from finetune_test_programs.generation import complete, log_probabilities
from finetune_trainer.export.gguf.layers.experts import count_experts

LENGTHS = (5, 9, 14, 22, 35, 58, 80, 110)
PROMPTS = [[3 + (7 * number + 13 * place) % 400 for place in range(LENGTHS[number // 5])] for number in range(40)]
TOKENS = 24
CONTEXT = 512  # where longrope's short divisors end in the models here
# transformers and llama.cpp, both in fp32, differ by at most 5.2e-5 in the log-probability of a token (Gemma 3; 2.4e-6
# for Phi-4). F16: 2e-3.
FP32_DIFFERENCE = 1e-4
# Where GELU gates nothing, a value that fp32 rounds to the next entry of llama.cpp's table counts in full (5.3e-4).
# Gemma 4 E2B has it in two places of each of six layers (3.2e-4, half of the prompts below 9e-5; 1e-3 without the
# table, half above 3.2e-4). Gemma 3n has it beside another formula: llama.cpp divides the spread of n gates by n - 1
# (3e-4; some 5e-5 with transformers patched to do the same).
TABLE_DIFFERENCE, BY_THE_TABLE = 1e-3, ("starcoder-2", "phi-2", "gemma-4-e2b", "gemma-3n")
F16_DIFFERENCE, DEEP_F16_DIFFERENCE, DEEP = 5e-3, 2e-2, 4  # the latter from that many layers on
# A lead that is none ends an answer here; nearly all tokens must be compared all the same.
SETTLED = 0.95
# Where two experts are as good, rounding chooses another one and the prompt's answer differs by as much as it likes
# (0.08 for Mixtral, 0.04 for Qwen1.5-MoE, of 40 prompts).
OTHER_EXPERTS = 4


@pytest.fixture(scope="module", params=family_params())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(name: str, family_base: Callable[[str], Path]) -> Expected:
    return said_by_transformers(family_base(name), PROMPTS, TOKENS)


def differences(file: Path, prompts: list[list[int]], expected: Expected, context: int = CONTEXT) -> torch.Tensor:
    """Largest difference of log-probabilities over all tokens, for each prompt: fp32 [prompts]."""
    size = expected.next.shape[1]
    found = log_probabilities(file, prompts, size=size, banned=expected.banned, context=context)
    return (torch.tensor(found) - expected.next).abs().amax(dim=1)


def largest_difference(file: Path, prompts: list[list[int]], expected: Expected, context: int = CONTEXT) -> float:
    """Largest difference of log-probabilities, over all prompts and tokens."""
    return float(differences(file, prompts, expected, context).max())


def test_the_f32_file_says_what_transformers_says(
    name: str, expected: Expected, family_base: Callable[[str], Path], export_gguf: Any, tmp_path: Path
) -> None:
    assert len({tuple(answer) for answer in expected.answers}) == len(PROMPTS), "the answers do not tell prompts apart"
    settled = expected.settled(expected.answers)
    assert sum(map(len, settled)) > SETTLED * len(PROMPTS) * TOKENS, "too many tokens are as good: choose another seed"
    file = export_gguf(family_base(name), tmp_path, "F32")["F32"]
    found = complete(file, PROMPTS, tokens=TOKENS, banned=expected.banned, context=CONTEXT)
    assert expected.settled(found) == settled
    allowed = TABLE_DIFFERENCE if name in BY_THE_TABLE else FP32_DIFFERENCE
    assert largest_difference(file, PROMPTS, expected) < allowed


def test_the_f16_file_is_as_close_as_its_type(
    name: str, expected: Expected, family_base: Callable[[str], Path], export_gguf: Any, tmp_path: Path
) -> None:
    file = export_gguf(family_base(name), tmp_path, "F16")["F16"]
    layers = json.loads((family_base(name) / "config.json").read_text())["num_hidden_layers"]
    # Granite's logits are spread four times as far as others'; transformers, rounding alike, is 5.3e-3 away there.
    spread = max(1.0, float(expected.next.std()))
    allowed = spread * (F16_DIFFERENCE if layers < DEEP else DEEP_F16_DIFFERENCE)
    found = differences(file, PROMPTS, expected)
    assert float(found.max()) > FP32_DIFFERENCE
    has_experts = count_experts(json.loads((family_base(name) / "config.json").read_text())) > 0
    assert int((found >= allowed).sum()) <= (OTHER_EXPERTS if has_experts else 0), found.sort().values[-8:]


SPOILED = {
    "q and k in Hugging Face's order": "llama-2",
    "norms around zero": "gemma-3",
    "no divisors of RoPE": "llama-3.1",
    "long and short divisors swapped": "phi-3-long",
}


@pytest.mark.parametrize("way", SPOILED)
def test_a_wrong_conversion_is_heard(
    way: str, family_base: Callable[[str], Path], export_gguf: Any, spoil: Callable[[str], None], tmp_path: Path
) -> None:
    base = family_base(SPOILED[way])
    spoil(way)
    expected = said_by_transformers(base, PROMPTS[-5:], TOKENS)
    file = export_gguf(base, tmp_path, "F32")["F32"]
    assert largest_difference(file, PROMPTS[-5:], expected) > 10 * F16_DIFFERENCE
    assert complete(file, PROMPTS[-5:], tokens=TOKENS, banned=expected.banned, context=CONTEXT) != expected.answers


@pytest.mark.parametrize("name", ["phi-3-long", "phi-4-mini"])
def test_beyond_the_original_context_the_long_divisors_are_used(
    name: str, family_base: Callable[[str], Path], export_gguf: Any, tmp_path: Path
) -> None:
    base = family_base(name)
    prompts = [[3 + (7 * number + 13 * place) % 400 for place in range(600)] for number in range(3)]
    file = export_gguf(base, tmp_path, "F32")["F32"]
    expected = said_by_transformers(base, prompts, tokens=1)
    assert largest_difference(file, prompts, expected, context=1024) < FP32_DIFFERENCE


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_smaller_types_load_and_mostly_agree(
    family_base: Callable[[str], Path], export_gguf: Any, tmp_path: Path, kind: str
) -> None:
    """Random weights have near ties, so some answers may differ; the first token of most prompts does not."""
    base = family_base("llama-3.1")
    expected = said_by_transformers(base, PROMPTS, TOKENS)
    file = export_gguf(base, tmp_path, kind)[kind]
    found = complete(file, PROMPTS, tokens=1, banned=expected.banned, context=CONTEXT)
    assert sum(ours[0] == theirs[0] for ours, theirs in zip(found, expected.answers, strict=True)) >= len(PROMPTS) - 2
