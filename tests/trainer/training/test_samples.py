"""Answers to fixed prompts: what is asked, that generation is right under our kernels, and that it leaves no trace."""

import logging
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.masking_utils import AttentionMaskInterface

from finetune_api.spec.training import SamplesSpec
from finetune_kernels.layers import packed_attention
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.patching import patch_model
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_trainer import stopping
from finetune_trainer.chat.labels import IGNORED
from finetune_trainer.documents.sample_table import sample_table
from finetune_trainer.errors import InterruptedRunError, TrainerError
from finetune_trainer.training.records import SampleLine
from finetune_trainer.training.samples import Sampler, build_prompts, choose_by, generate_tokens, sampling_mode

PROMPTS = ("Tell me of canary-prompt.", "Hi", "What is 2 + 2, and why is it not 5 for large values of 2?")
GREEDY = choose_by(0.0, [])
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def model(tiny_base: Path) -> Any:
    """In training, with an adapter that changes something."""
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=LINEARS, lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapted.train()
    return adapted


def sampler_for(tokenizer: Any, folder: Path, prompts: tuple[str, ...] = PROMPTS, **spec: Any) -> Sampler:
    settings = SamplesSpec(**{"prompts": prompts, "max_tokens": 12} | spec)
    return Sampler(build_prompts(settings, tokenizer, None, 128), settings, tokenizer, 3407, folder)


def answers(tokenizer: Any, folder: Path, model: Any, **spec: Any) -> list[str]:
    sampler = sampler_for(tokenizer, folder, **spec)
    sampler.take(model, 0)
    return [line.answer for line in sampler.lines()]


def test_a_prompt_is_a_user_message_before_an_answer(tokenizer: Any) -> None:
    (prompt,) = build_prompts(SamplesSpec(prompts=("Hi",)), tokenizer, None, 128)
    rendered = tokenizer.decode(prompt.input_ids)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = None
    (plain,) = build_prompts(SamplesSpec(prompts=("Hi",)), tokenizer, None, 128)
    assert tokenizer.decode(plain.input_ids) == "Hi"


def test_a_prompt_longer_than_a_row_may_be_is_refused_by_its_number(tokenizer: Any) -> None:
    with pytest.raises(TrainerError, match=r"prompts\[1\] has \d+ tokens, more than maxSequenceLength = 32"):
        build_prompts(SamplesSpec(prompts=("Hi", "canary " * 50)), tokenizer, None, 32)


def test_rows_are_asked_up_to_their_first_answer(tokenizer: Any) -> None:
    def row(asked: str, said: str, later: str) -> dict[str, list[int]]:
        parts = [tokenizer(part)["input_ids"] for part in (asked, said, later)]
        labels = [IGNORED] * len(parts[0]) + parts[1] + [IGNORED] * len(parts[2])
        return {"input_ids": [*chain(*parts)], "labels": labels}

    text = tokenizer("one two three four five six seven eight")["input_ids"]
    rows = [row(f"question {n}", f"answer {n}", "and so on") for n in range(6)]
    data = Dataset.from_list([{"input_ids": text, "labels": text}, *rows])
    prompts = build_prompts(SamplesSpec(), tokenizer, data, 128)
    assert [prompt.text for prompt in prompts[1:]] == ["question 0", "question 1", "question 2"]
    assert prompts[1].reference == "answer 0"
    assert prompts[0].input_ids == text[: len(text) // 2], "a row without a question is asked by its first half"


def test_answers_are_those_of_each_prompt_alone(tokenizer: Any, model: Any, tmp_path: Path) -> None:
    """Prompts of different lengths are padded on the left, which must change nothing."""
    together = answers(tokenizer, tmp_path / "together", model)
    alone = [answers(tokenizer, tmp_path / str(n), model, prompts=(p,))[0] for n, p in enumerate(PROMPTS)]
    assert together == alone
    assert len(set(together)) == len(PROMPTS), "answers that are all alike would prove nothing"
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(0.5)
    assert answers(tokenizer, tmp_path / "changed", model) != together, "the adapter takes part"


def test_answers_are_those_that_transformers_generates(tokenizer: Any, model: Any, tmp_path: Path) -> None:
    found = answers(tokenizer, tmp_path, model, max_tokens=20)
    config = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model.eval()
    for answer, prompt in zip(found, build_prompts(SamplesSpec(prompts=PROMPTS), tokenizer, None, 128), strict=True):
        ids = torch.tensor([prompt.input_ids])
        said = model.get_base_model().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
        assert answer == tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_row_ends_with_its_end_token_and_the_batch_with_the_last_row(model: Any) -> None:
    ids = torch.arange(3, 13).view(2, 5)
    with torch.no_grad():
        free = torch.stack(list(generate_tokens(model, ids, torch.ones_like(ids), [], 12, GREEDY)))
        ends = [int(free[2, 0]), int(free[5, 1])]
        stopped = torch.stack(list(generate_tokens(model, ids, torch.ones_like(ids), ends, 12, GREEDY)))
    first = [next(n for n, token in enumerate(free[:, row].tolist()) if token in ends) for row in (0, 1)]
    assert len(free) == 12
    assert len(stopped) == max(first) + 1
    assert torch.equal(stopped, free[: len(stopped)])


def test_our_layers_and_our_attention_generate_what_transformers_does(
    tokenizer: Any, model: Any, tmp_path: Path
) -> None:
    expected = answers(tokenizer, tmp_path / "before", model)
    causal = model.get_base_model()
    fused = FusedLayers(
        causal, [ActivationPolicy.SAVE_ALL] * len(causal.model.layers), torch.float32, keep_dequantized=True
    )
    assert packed_attention.use_packed_attention(causal) is None
    assert patch_model(model, keep_dequantized=False).norms > 0
    assert causal.config._attn_implementation == packed_attention.NAME
    assert answers(tokenizer, tmp_path / "after", model) == expected
    fused.move_vocabulary()
    assert answers(tokenizer, tmp_path / "moved", model) == expected
    AttentionMaskInterface.register(packed_attention.NAME, lambda **_: None)
    try:
        assert answers(tokenizer, tmp_path / "unmasked", model) != expected, "padding is seen without its mask"
    finally:
        packed_attention.use_packed_attention(causal)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_leaves_no_trace(tokenizer: Any, model: Any, tmp_path: Path, temperature: float) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    random = torch.random.get_rng_state()
    first = answers(tokenizer, tmp_path / "first", model, temperature=temperature)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
    assert first == answers(tokenizer, tmp_path / "again", model, temperature=temperature)


def test_the_trace_that_the_test_above_looks_for_would_be_seen(model: Any) -> None:
    random = torch.random.get_rng_state()
    with sampling_mode(model, 1):
        torch.rand(1)
        assert not model.training
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), random)
    torch.rand(1)
    assert not torch.equal(torch.random.get_rng_state(), random)


def test_nothing_that_is_asked_or_answered_is_logged(
    tokenizer: Any, model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        said = answers(tokenizer, tmp_path, model)
    told = caplog.text + "".join(capsys.readouterr())
    assert "3 samples of step 0" in told
    assert "canary" not in told
    assert not [answer for answer in said if answer in told]


def test_a_step_is_sampled_once_and_checkpoints_carry_the_file(tokenizer: Any, model: Any, tmp_path: Path) -> None:
    first = sampler_for(tokenizer, tmp_path / "first")
    first.take(model, 0)
    first.take(model, 0)
    (tmp_path / "checkpoint").mkdir()
    first.save_into(tmp_path / "checkpoint")
    first.take(model, 5)
    second = sampler_for(tokenizer, tmp_path / "second")
    second.restore_from(tmp_path / "checkpoint")
    second.take(model, 0)
    second.take(model, 7)
    assert [line.step for line in first.lines()] == [0] * 3 + [5] * 3
    assert [line.step for line in second.lines()] == [0] * 3 + [7] * 3


def test_without_memory_for_answers_training_goes_on(
    tokenizer: Any, model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    sampler = sampler_for(tokenizer, tmp_path)
    model.get_base_model().forward = fail
    sampler.take(model, 4)
    assert sampler.lines() == ()
    assert "no samples of step 4" in caplog.text
    assert model.training


def test_the_table_shows_first_last_and_exported_step_and_nothing_of_it_is_markdown() -> None:
    hostile = "a|b\n<script>`x`</script> [y](z)"
    lines = [
        SampleLine(step=step, prompt=hostile, answer=f"said {step}", tokens=2, finished=True, reference="r" * 999)
        for step in range(0, 100, 10)
    ]
    text = "\n".join(sample_table(lines, exported_step=50))
    assert all(f"| {step} | said {step} |" in text for step in (0, 50, 90))
    assert "said 20" not in text
    assert "<script>" not in text
    assert "a&#124;b<br>" in text
    assert max(map(len, text.splitlines())) < 600


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_the_prompts_and_give_the_answers_of_one_process(
    tokenizer: Any, model: Any, tmp_path: Path, temperature: float, size: int
) -> None:
    alone = answers(tokenizer, tmp_path / "alone", model, temperature=temperature)
    samplers = [sampler_for(tokenizer, tmp_path / str(rank), temperature=temperature) for rank in range(size)]
    held: dict[int, Any] = {}
    for rank in reversed(range(size)):  # in one process, so the one that writes comes last

        def gather(value: Any, rank: int = rank) -> list[Any]:
            held[rank] = value
            return [held[each] for each in sorted(held)]

        samplers[rank].take(model, 0, SimpleNamespace(rank=rank, size=size, gather_objects=gather))  # type: ignore[arg-type]

    assert [line.answer for line in samplers[0].lines()] == alone
    shares = [2, 1] if size == 2 else [1, 1, 1, 0]
    assert [len(held[rank][0]) for rank in range(size)] == shares, "each answers its own"
    assert all(not sampler.lines() for sampler in samplers[1:])
    assert all(sampler.has(0) for sampler in samplers)


def test_a_rank_without_memory_or_with_a_stop_leaves_all_without_samples(
    tokenizer: Any, model: Any, tmp_path: Path
) -> None:
    sampler = sampler_for(tokenizer, tmp_path)
    short = SimpleNamespace(rank=0, size=2, gather_objects=lambda value: [value, (None, False)])
    sampler.take(model, 0, short)  # type: ignore[arg-type]
    assert not sampler.has(0)
    stopped = SimpleNamespace(rank=0, size=2, gather_objects=lambda value: [value, (None, True)])
    try:
        with pytest.raises(InterruptedRunError, match="another rank"):
            sampler.take(model, 0, stopped)  # type: ignore[arg-type]
    finally:
        stopping.reset()
    assert sampler.lines() == ()
