"""GGUF files that cannot be made are known before anything trains, and the answer is the export's own."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.spec.output import ExportSpec
from finetune_api.spec.training import AdapterSpec
from finetune_api.vocabulary import MergedType, Precision
from finetune_test_models.family_models import FAMILY_MODELS, make_family_model
from finetune_test_models.tiny_model import train_tokenizer
from finetune_test_models.tiny_runs import Builder
from finetune_trainer.cli.pod import run_job
from finetune_trainer.export.errors import ExportError, InvalidAdapterError
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.model.safetensors_header import TensorHeader
from finetune_trainer.preflight.checks import run_preflight
from finetune_trainer.preflight.judgements.export import judge_merge
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.saving import check_saving

WAY_ON = "to train without GGUF files, write export: {gguf: []}"


@dataclass(frozen=True)
class Refused:
    """A base that cannot be converted, and a part of the reason."""

    make: Callable[[Path, list[str]], Path]
    says: str
    reason: str = "UnsupportedArchitecture"


def of_type(model_type: str, **settings: Any) -> Callable[[Path, list[str]], Path]:
    def make(folder: Path, texts: list[str]) -> Path:
        train_tokenizer(texts, vocab_size=512).save_pretrained(folder)
        sizes = {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
        }  # fmt: skip
        config = CONFIG_MAPPING[model_type](**sizes | settings)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
        return folder

    return make


def changed(name: str, file: str, **changes: Any) -> Callable[[Path, list[str]], Path]:
    def make(folder: Path, texts: list[str]) -> Path:
        made = make_family_model(name, folder, texts)
        written = json.loads((made / file).read_text())
        (made / file).write_text(json.dumps(written | changes))
        return made

    return make


def with_vision_gaps(folder: Path, texts: list[str]) -> Path:
    """A tensor that the family does not have."""
    made = make_family_model("llama-2", folder, texts)
    weights = load_file(made / "model.safetensors")
    weights["model.layers.0.self_attn.qk_norm.weight"] = torch.ones(64)
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made


UNKNOWN = {"type": "Sequence", "pretokenizers": [
    {"type": "Whitespace"}, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
]}  # fmt: skip
SCALED = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 512}  # fmt: skip

REFUSED: dict[str, Refused] = {
    "a family without a row": Refused(of_type("diffllama", pad_token_id=0), "model_type 'diffllama'"),
    "another family without a row": Refused(of_type("helium"), "model_type 'helium'"),
    "words split in an unknown way": Refused(
        changed("llama-linear", "tokenizer.json", pre_tokenizer=UNKNOWN),
        "Whitespace, then ByteLevel with add_prefix_space True",
    ),
    "an activation that llama.cpp does not compute": Refused(
        changed("llama-2", "config.json", hidden_act="gelu"), "llama.cpp computes silu"
    ),
    "a scaling of RoPE that the architecture lacks": Refused(
        changed("qwen2.5", "config.json", rope_parameters=SCALED), "no RoPE scaling 'llama3'"
    ),
    "a tensor that has no name": Refused(with_vision_gaps, "qk_norm", "InvalidConfiguration"),
}  # fmt: skip


def answer_of_export(base: Path, output: Path) -> str | None:
    request = ExportRequest(base, None, output, merged=None, gguf=("Q8_0",), name="m")
    try:
        export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
    except ExportError as error:
        return error.message.removesuffix(": export without GGUF")
    return None


def answer_of_preflight(config: RunConfig, settings: Settings) -> str | None:
    found = [
        finding for finding in run_preflight(config, settings)[0].errors() if finding.location == "spec.export.gguf"
    ]
    assert len(found) <= 1
    return found[0].message.removesuffix(f"; {WAY_ON}") if found else None


def job(run_config: Builder, base: Path, **export: Any) -> RunConfig:
    model = {"source": f"file://{base}", "quantization": "None"}
    return run_config(model=model, export={"gguf": ["Q8_0"]} | export, training={"maxSteps": 1})


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_preflight_and_export_agree_on_every_family(
    name: str, run_config: Builder, settings: Settings, tmp_path: Path, texts: list[str]
) -> None:
    base = make_family_model(name, tmp_path / "base", texts)
    assert answer_of_preflight(job(run_config, base), settings) is None
    assert answer_of_export(base, tmp_path / "out") is None


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_the_export_would_refuse_is_said_before_anything_trains(
    case: Refused, run_config: Builder, settings: Settings, tmp_path: Path, texts: list[str]
) -> None:
    base = case.make(tmp_path / "base", texts)
    said = answer_of_export(base, tmp_path / "out")
    assert said is not None
    assert case.says in said
    config = job(run_config, base)
    assert answer_of_preflight(config, settings) == said
    progress = ProgressTracker()
    outcome = run_job(config, settings, progress, StopSignal())
    assert (outcome.reason, outcome.step) == (case.reason, None)
    assert outcome.message == f"spec.export.gguf: {said}; {WAY_ON}"
    assert answer_of_preflight(job(run_config, base, gguf=[]), settings) is None, "nothing is asked for"


def without_prefix(folder: Path, texts: list[str]) -> Path:
    made = make_family_model("llama-2", folder, texts)
    weights = {name.removeprefix("model."): value for name, value in load_file(made / "model.safetensors").items()}
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made


def with_a_mask(folder: Path, texts: list[str]) -> Path:
    made = make_family_model("llama-2", folder, texts)
    weights = load_file(made / "model.safetensors")
    weights["model.layers.0.self_attn.mask"] = torch.ones(8, 8, dtype=torch.bool)
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made


UNMERGEABLE = {
    "layers that are kept in another order": (
        of_type("gpt2", bos_token_id=1, eos_token_id=2),
        "spec.adapter.targetModules",
        "c_attn",
    ),
    "layers without the model's prefix": (without_prefix, "spec.adapter.targetModules", "without the model's prefix"),
    "a mask among the weights": (with_a_mask, "spec.model.source", "stored as BOOL"),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # peft sets it to True
@pytest.mark.parametrize(("make", "location", "says"), UNMERGEABLE.values(), ids=UNMERGEABLE)
def test_an_adapter_that_cannot_be_merged_is_said_by_preflight_and_refused_before_it_trains(
    make: Callable[[Path, list[str]], Path],
    location: str,
    says: str,
    run_config: Builder,
    settings: Settings,
    tmp_path: Path,
    texts: list[str],
) -> None:
    base = make(tmp_path / "base", texts)
    config = job(run_config, base, merged="BF16", gguf=[])
    config = config.model_copy(update={"adapter": AdapterSpec(target_modules=("all-linear",))})
    (found,) = run_preflight(config, settings)[0].errors()
    assert (found.location, found.reason) == (location, FailureReason.INVALID_CONFIGURATION)
    assert says in found.message
    assert "write export: {merged: None, gguf: []}" in found.message

    outcome = run_job(config, settings, ProgressTracker(), StopSignal())
    assert (outcome.reason, outcome.step) == (FailureReason.INVALID_CONFIGURATION, None), "the trainer says so too"
    assert outcome.message.endswith("to train the adapter alone, write export: {merged: None, gguf: []}")

    alone = config.model_copy(update={"export": ExportSpec(merged=MergedType.NONE, gguf=())})
    assert not run_preflight(alone, settings)[0].errors(), "the way out that it names"


def test_types_of_tensors_count_also_where_names_tell_nothing_of_the_layers(
    run_config: Builder, tmp_path: Path
) -> None:
    """DeepSeek V4's table of experts by token, whose layers have other names in its files."""
    config = job(run_config, tmp_path)
    table = TensorHeader("model.layers.0.ffn.gate.tid2eid", "I64", (8, 8), "model.safetensors", 0, 512)
    (finding,) = judge_merge(config, "deepseek_v4", None, [table])
    assert "tid2eid in model.safetensors is stored as I64" in finding.message
    assert not list(judge_merge(config, "deepseek_v4", None, ()))


def test_the_default_export_is_checked_too(
    run_config: Builder, settings: Settings, tmp_path: Path, texts: list[str]
) -> None:
    base = of_type("diffllama", pad_token_id=0)(tmp_path / "base", texts)
    config = job(run_config, base)
    unset = RunConfig.model_validate(config.to_wire() | {"export": {}})
    assert [kind.value for kind in unset.export.gguf] == ["Q8_0"]
    assert answer_of_preflight(unset, settings) is not None


def test_the_check_needs_no_torch(tmp_path: Path, run_config: Builder, texts: list[str]) -> None:
    base = make_family_model("llama-3.1", tmp_path / "base", texts)
    (tmp_path / "job.yaml").write_text(job(run_config, base).to_yaml())
    program = (
        "import sys; from pathlib import Path\n"
        "from finetune_trainer.preflight.process_memory import block_torch_import\n"
        "block_torch_import()\n"
        "from finetune_api.run_config import RunConfig\n"
        "from finetune_trainer.job.settings import Settings\n"
        "from finetune_trainer.preflight.checks import run_preflight\n"
        "folder = Path(sys.argv[1])\n"
        "settings = Settings(folder / 'work', 'a', output_folder=folder / 'out')\n"
        "config = RunConfig.from_yaml((folder / 'job.yaml').read_text())\n"
        "print([str(finding) for finding in run_preflight(config, settings)[0].errors()], sys.modules['torch'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] None", done.stdout


def test_a_base_with_only_sentencepieces_file_is_judged_by_what_would_be_published(
    run_config: Builder, settings: Settings, tmp_path: Path, texts: list[str]
) -> None:
    base = make_family_model("llama-linear", tmp_path / "base", texts)
    tokenizer = AutoTokenizer.from_pretrained(base)
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]
    (base / "tokenizer.json").unlink()
    (base / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    (base / "merges.txt").write_text("\n".join(" ".join(pair) for pair in vocabulary["merges"]))
    assert tokenizer.eos_token_id is not None
    assert answer_of_preflight(job(run_config, base), settings) is None


def test_an_adapter_that_cannot_be_merged_is_refused_before_it_trains(
    run_config: Builder, tiny_base: Path, tmp_path: Path
) -> None:
    """A layer whose weight has another name in the files: transformers 5 renames some when it loads them."""
    config = run_config(export={"merged": "BF16"})
    loaded = load_model(tiny_base, config.model, Precision.FP32, gpus=0)
    model = inject_adapter(loaded.model, config.adapter, 0).model
    check_saving(model, loaded, tiny_base, config, tmp_path / "fits")

    renamed = shutil.copytree(tiny_base, tmp_path / "renamed")
    weights = load_file(renamed / "model.safetensors")
    save_file(
        {name.replace("q_proj", "query"): value for name, value in weights.items()}, renamed / "model.safetensors"
    )
    with pytest.raises(InvalidAdapterError, match=r"q_proj.*write export: \{merged: None, gguf: \[\]\}"):
        check_saving(model, loaded, renamed, config, tmp_path / "renamed-tokenizer")
    alone = run_config(export={"merged": "None", "gguf": []})
    check_saving(model, loaded, renamed, alone, tmp_path / "alone")
