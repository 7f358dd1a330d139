"""New tokens of mixtures and of checkpoints that also read images: their rows train, merge and stand in GGUF files, and
nothing else of the vocabulary changes, whatever the weight decay."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from finetune_api.outcome import Result
from finetune_test_models.minimal_run import minimal_run
from finetune_test_models.published.multimodal_models import make_multimodal_model
from finetune_test_models.references.exact_merges import load_all
from finetune_test_models.tiny_architectures import make_mixture
from finetune_trainer.cli.pod import run_job
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal

NEW = ["<|note|>", "Zwölftonreihe", "<|never|>"]
UNUSED = 2
"""The place in NEW of a token that no row holds."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MIXTURES, MULTIMODAL = ("qwen3_moe", "gpt_oss"), ("gemma3", "qwen2_5_vl")
MODELS = [
    "qwen3_moe",
    "gemma3",
    *(pytest.param(name, marks=pytest.mark.gguf) for name in ("gpt_oss", "qwen2_5_vl")),
]
"""One of each kind, with a tied head and without; `make gguf` tries all."""


class Trained(NamedTuple):
    """A finished run."""

    name: str
    base: Path
    adapter: Path
    merged: Path
    gguf: Path
    has_experts: bool

    def load(self, folder: Path) -> Any:
        """The model in fp32, as the base's own class."""
        kind: Any = AutoModelForCausalLM if self.has_experts else AutoModelForImageTextToText
        return kind.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    make: Any = (lambda *a: make_mixture(a[1], a[0], a[2])) if name in MIXTURES else make_multimodal_model
    base = make(name, folder / "base", texts)
    answers = [f"<|note|>the Zwölftonreihe has {count} notes" for count in range(20)]
    chats = [[{"role": "user", "content": "and?"}, {"role": "assistant", "content": text}] for text in answers]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))

    config = minimal_run(
        model={"source": f"file://{base}", "newTokens": NEW, "maxSequenceLength": 128},
        dataset={"source": f"file://{folder / 'rows.jsonl'}"},
        adapter={"rank": 4},
        training={"maxSteps": 4, "batchSize": 1, "gradientAccumulation": 2, "learningRate": 1e-2, "weightDecay": 0.5},
        export={"merged": "BF16", "gguf": ["F16"]},
        job={"namespace": "default", "name": "tiny", "uid": "u"},
    ).model_copy(update={"gpus": 0})
    outcome = run_job(
        config,
        Settings(work=folder / "work", attempt_id="a", output_folder=folder / "out"),
        ProgressTracker(),
        StopSignal(),
    )
    assert outcome.result is Result.SUCCEEDED, outcome.message
    adapter, merged, gguf = (Path(artifact.uri) for artifact in outcome.artifacts[:3])
    return Trained(name, base, adapter, merged, gguf, name in MIXTURES)


def test_only_rows_of_tokens_that_rows_hold_have_learned(trained: Trained) -> None:
    before, after = load_all(trained.base), load_all(trained.merged)
    assert before.keys() == after.keys()
    tokenizer, rows = AutoTokenizer.from_pretrained(trained.base), before[EMBEDDING].shape[0]
    first = len(tokenizer)
    for name in [each for each in (EMBEDDING, HEAD) if each in before]:
        kept = min(first, rows)
        assert torch.equal(after[name][:kept], before[name][:kept]), "old rows, byte for byte"

    changes = []
    for number, text in enumerate(NEW, first):
        start = before[EMBEDDING][tokenizer(text, add_special_tokens=False)["input_ids"]].float().mean(0)
        changes.append(float((after[EMBEDDING][number].float() - start.bfloat16().float()).abs().max()))
    # Without a gradient nothing moves it, no decay either; a tied head teaches it not to be answered.
    assert (changes.pop(UNUSED) == 0) is (HEAD in before)
    assert min(changes) > 5e-3


# peft looks for the rank of the stack that it makes of gate and up among modules only, and takes it all the same.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_the_merged_checkpoint_and_the_adapter_answer_alike(trained: Trained) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained.merged)
    ids = tokenizer("a<|note|> Zwölftonreihe of <|never|>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    new = tokenizer.convert_tokens_to_ids(NEW)
    assert set(new) <= set(ids[0].tolist())

    merged, base = trained.load(trained.merged), trained.load(trained.base)
    rows = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(max(rows, len(tokenizer)))
    adapted = PeftModel.from_pretrained(base, trained.adapter).eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits[..., : len(tokenizer)]
        found = merged(input_ids=ids).logits[..., : len(tokenizer)]
        other = merged(input_ids=ids.clamp(max=min(new) - 1)).logits[..., : len(tokenizer)]
    difference, change = (found - expected).abs().max(), (other - expected).abs().max()
    print(f"{trained.name}: difference {difference:.2e}, change {change:.2e}")
    assert difference < 0.1 * change  # BF16 rounds merged weights: 0.8 % for gpt-oss


def test_the_gguf_file_has_the_rows_of_the_merged_checkpoint(trained: Trained) -> None:
    reader, merged = GGUFReader(trained.gguf), open_base_model(trained.merged)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    new = AutoTokenizer.from_pretrained(trained.merged).convert_tokens_to_ids(NEW)
    assert [tokens[number] for number in new] == NEW
    assert len(tokens) == merged.full_config["vocab_size"]

    (table,) = [tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"]
    rows = torch.tensor(table.data[new]).float()
    expected = next(tensor for tensor in merged.tensors if tensor.name == EMBEDDING).read()[new].float()
    assert torch.allclose(rows, expected, atol=1e-2), "F16 and BF16 of the same values"
