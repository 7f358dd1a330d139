"""Mixtures from a job to its GGUF files: NF4 experts with adapters train, and every file that the job publishes holds
what was trained, by llama.cpp's converter, its quantiser and its answers, and by the job's own judgement."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from finetune_api.judgement import Judgement
from finetune_api.outcome import Result
from finetune_test_models.family_models import pre_tokenizer_of
from finetune_test_models.minimal_run import minimal_run
from finetune_test_models.references.exact_merges import load_all, merged_in_fp32
from finetune_test_models.references.greedy_answers import said_by_transformers
from finetune_test_models.references.whole_losses import load_in_fp32, make_rows, routed_loss, whole_loss
from finetune_test_programs.file_differences import different_tensors
from finetune_test_programs.generation import complete
from finetune_test_programs.llama_cpp_converter import Conversion, convert
from finetune_test_programs.reference_quantizer import quantize_files
from finetune_trainer.artifacts.manifest import Manifest, ManifestArtifact
from finetune_trainer.cli.pod import run_job
from finetune_trainer.export.judge.measure import Candidates, measure_losses
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal

pytestmark = pytest.mark.gguf
FAMILIES = ("qwen3-moe", "gpt-oss", "qwen3-next", "qwen3.5-moe", "gemma-4-26b-a4b", "minimax-m2")
"""Files with a matrix for each expert, with stacks that have biases, two beside linear attention,
stacks beside an MLP, and w1, w2 and w3 of experts that a bias helps to choose."""
ROUNDING = {"qwen3-next": 2e-2, "qwen3.5-moe": 2e-2, "minimax-m2": 2e-2}
"""Nats by which the loss of a file in 16 or 8 bits may differ from the merged one's, if not 5e-3. Of these 8e-3 were
measured: rounding sends about 1 token in 80 of a small random model to other experts (see the test of routes)."""
LEARNT = {"gemma-4-26b-a4b": 0.04}
"""Nats that training takes off at least, if not half of one: the logits of this random Gemma are near zero, as its
embedding is small and is its head."""
CONVERTED, QUANTISED = ("F16", "Q8_0"), "Q4_K_M"
PROMPTS = [[3 + (7 * number + 13 * place) % 400 for place in range(9 + 5 * (number // 4))] for number in range(12)]
TOKENS = 8


@dataclass(frozen=True)
class Trained:
    """A finished job on a mixture."""

    base: Path
    adapter: Path
    merged: Path
    files: dict[str, Path]
    exact: Path
    """Folder with the merged weights in fp32, before any file rounds them."""
    theirs: dict[str, Path]
    """Files of llama.cpp's converter from that folder, by type; from the base, as "base"."""
    artifacts: tuple[ManifestArtifact, ...]
    judgement: Judgement | None
    rounding: float
    learnt: float


@pytest.fixture(scope="module", params=FAMILIES)
def trained(
    request: pytest.FixtureRequest,
    family_base: Callable[[str], Path],
    chat_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    name, folder = request.param, tmp_path_factory.mktemp("job")
    base = family_base(name)
    config = minimal_run(
        model={"source": f"file://{base}", "maxSequenceLength": 128},
        dataset={"source": f"file://{chat_file}", "evaluation": {"fraction": 0.2}},
        adapter={"rank": 4},
        training={"maxSteps": 6, "batchSize": 1, "gradientAccumulation": 2, "learningRate": 2e-2, "precision": "FP32"},
        export={"merged": "BF16", "gguf": ["F32", *CONVERTED, QUANTISED]},
        job={"namespace": "default", "name": "tiny", "uid": "u"},
    ).model_copy(update={"gpus": 0})
    settings = Settings(work=folder / "work", attempt_id="a", output_folder=folder / "out")
    outcome = run_job(config, settings, ProgressTracker(), StopSignal())
    assert outcome.result is Result.SUCCEEDED, outcome.message

    manifest = Manifest.decode((folder / "out" / "tiny" / "manifest.json").read_bytes())
    adapter, merged = (Path(each.uri) for each in manifest.artifacts[:2])
    files = {str(each.quantization): Path(each.uri) for each in manifest.artifacts if each.type == "GGUF"}
    exact = merged_in_fp32(base, adapter, folder / "exact")

    theirs = {kind: folder / f"theirs-{kind}.gguf" for kind in (*CONVERTED, "base")}
    pre = pre_tokenizer_of(name)
    runs = [Conversion(str(exact), str(theirs[kind]), kind.lower(), "tiny", pre) for kind in CONVERTED]
    convert([*runs, Conversion(str(base), str(theirs["base"]), "f16", "tiny", pre)])
    return Trained(
        base,
        adapter,
        merged,
        files,
        exact,
        theirs,
        manifest.artifacts,
        manifest.judgement,
        ROUNDING.get(name, 5e-3),
        LEARNT.get(name, 0.5),
    )


def is_gemma(trained: Trained) -> bool:
    return '"gemma4_text"' in (trained.base / "config.json").read_text()


def test_files_hold_the_merged_weights_as_the_converter_writes_them(trained: Trained) -> None:
    for kind in CONVERTED:
        assert different_tensors((GGUFReader(trained.files[kind]), GGUFReader(trained.theirs[kind]))) == [], kind

    merged, exact = load_all(trained.merged), load_all(trained.exact)
    assert merged.keys() == exact.keys() == load_all(trained.base).keys(), "the original's tensors and no others"
    assert all(torch.equal(merged[name], exact[name].bfloat16()) for name in exact)


def test_all_experts_differ_from_those_of_the_base(trained: Trained) -> None:
    """The negative control: the comparison sees adapters on experts, in every layer and matrix."""
    changed = different_tensors((GGUFReader(trained.files["F16"]), GGUFReader(trained.theirs["base"])))
    parts = ("gate_up", "down") if is_gemma(trained) else ("gate", "up", "down")
    assert {f"blk.{layer}.ffn_{part}_exps.weight" for layer in range(2) for part in parts} <= set(changed)
    assert not [name for name in changed if "gate_inp" in name or name.endswith("bias")], (
        "routers and biases are frozen"
    )


def test_k_quants_of_experts_are_as_close_as_llama_cpps_own(trained: Trained, tmp_path: Path) -> None:
    quantize_files(trained.files["F32"], {QUANTISED: tmp_path / "theirs.gguf"})
    plain, ours, theirs = (
        {each.name: each for each in GGUFReader(path).tensors}
        for path in (trained.files["F32"], trained.files[QUANTISED], tmp_path / "theirs.gguf")
    )
    assert {name: each.tensor_type for name, each in ours.items()} == {
        n: each.tensor_type for n, each in theirs.items()
    }
    experts = [name for name in plain if name.endswith("_exps.weight")]
    assert {ours[name].tensor_type.name for name in experts} == {"Q4_K", "Q6_K"}

    def error(tensors: dict[str, ReaderTensor], name: str) -> float:
        found, weights = tensors[name], plain[name].data
        decoded = dequantize(found.data, found.tensor_type).reshape(weights.shape)
        return float(np.sqrt((np.abs(weights) * (decoded - weights) ** 2).sum() / np.abs(weights).sum()))

    assert sum(error(ours, name) for name in experts) <= sum(error(theirs, name) for name in experts)


def test_llama_cpp_answers_as_transformers_does(trained: Trained) -> None:
    expected = said_by_transformers(trained.exact, PROMPTS, TOKENS)
    settled = expected.settled(expected.answers)
    assert sum(map(len, settled)) > 0.95 * len(PROMPTS) * TOKENS
    assert len({tuple(answer) for answer in expected.answers}) == len(PROMPTS)

    found = complete(trained.files["F32"], PROMPTS, tokens=TOKENS, banned=expected.banned, context=512)
    assert expected.settled(found) == settled
    before = said_by_transformers(trained.base, PROMPTS, TOKENS)
    assert before.answers != expected.answers, "the training changed the answers"


def test_losses_of_files_are_those_of_transformers_whose_weights_are_rounded_alike(trained: Trained) -> None:
    """So whatever lies between the losses of two files is what their rounding does to the model."""
    rows = make_rows(40, 7, 120)
    candidates = Candidates(trained.base, trained.adapter, trained.merged, {"F32": trained.files["F32"]})
    losses = measure_losses(candidates, rows, torch.device("cpu"))
    exact, merged, base = (
        whole_loss(load_in_fp32(folder), rows) for folder in (trained.exact, trained.merged, trained.base)
    )
    print(f"exact {exact:.5f}, merged in bfloat16 {merged:.5f}, base {base:.5f}; {losses}")
    assert losses.files["F32"] == pytest.approx(exact, rel=1e-5)
    assert losses.merged == pytest.approx(merged, rel=1e-5)
    assert abs(exact - base) > trained.learnt / 50, "the comparison sees the training"


def test_what_rounding_changes_is_the_choice_of_experts(trained: Trained) -> None:
    """With the experts that the exact weights choose, merged weights in bfloat16 compute nearly the same loss: 1.0e-3
    nats apart at most were measured, and 2.0e-2 with their own choice."""
    config = (trained.base / "config.json").read_text()
    if is_gemma(trained) or any(f'"{each}"' in config for each in ("gpt_oss", "minimax_m2")):
        pytest.skip("its router's weights follow another formula")
    rows = make_rows(40, 7, 120)
    exact, merged = load_in_fp32(trained.exact), load_in_fp32(trained.merged)
    expected, routes = routed_loss(exact, rows)
    assert routed_loss(exact, rows, routes)[0] == pytest.approx(expected, rel=1e-6)

    found, _ = routed_loss(merged, rows, routes)
    print(f"exact {expected:.5f}, rounded {whole_loss(merged, rows):.5f}, rounded with its routes {found:.5f}")
    assert found == pytest.approx(expected, abs=3e-3)
    elsewhere, _ = routed_loss(merged, rows, [(each + 1) % 4 for each in routes])
    assert abs(elsewhere - expected) > 1e-2, "other experts are another model"


def test_the_job_judges_every_file_of_a_mixture(trained: Trained) -> None:
    judgement = trained.judgement
    assert judgement is not None
    assert judgement.warnings == ()
    assert judgement.base_loss - judgement.adapter_loss > trained.learnt
    losses = {each.quantization: each.loss for each in trained.artifacts if each.type == "GGUF"}
    for kind in ("F32", *CONVERTED):
        assert losses[kind] == pytest.approx(judgement.merged_loss, abs=trained.rounding), kind
    assert losses[QUANTISED] != losses["F32"]
    assert losses[QUANTISED] == pytest.approx(judgement.merged_loss, abs=0.1)
