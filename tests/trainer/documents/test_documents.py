"""Model card, loss plot and resolved.yaml of a run, read back by those who read them: the Hub's parser, XML, YAML."""

import contextlib
import re
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.progress import Resolved
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import ArtifactType
from finetune_trainer.artifacts.store import LocalArtifact
from finetune_trainer.documents.loss_plot import render_loss_plot
from finetune_trainer.documents.write import RunSummary, write_documents
from finetune_trainer.training.metrics_log import MetricLine
from finetune_trainer.training.outcome import TrainingOutcome
from finetune_trainer.training.records import LossPoint

Builder = Callable[..., RunConfig]
HISTORY = [LossPoint(1, 2.0), LossPoint(2, 1.0), LossPoint(2, 1.5, is_evaluation=True)]
BEGUN = datetime(2026, 1, 1, tzinfo=UTC)
LINES = [
    MetricLine(step=step, time=BEGUN + timedelta(minutes=minute), tokens_per_second=speed)
    for step, minute, speed in ((1, 0, None), (2, 30, 1500.0), (3, 62, 1500.0))
]
NAMESPACE = {"svg": "http://www.w3.org/2000/svg"}


@pytest.fixture
def documents(run_config: Builder, tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Builder of (card, resolved.yaml) for a job on a Hub model."""

    def build(
        *,
        is_dequantised: bool = False,
        base_dropout: str | None = None,
        used: Mapping[str, float] | None = None,
        chosen: Mapping[str, str] | None = None,
        **sections: dict[str, object],
    ) -> tuple[str, str]:
        model = {"source": "hf://acme/base", "credentials": {"secretName": "canary-hub-secret"}}
        output = {"s3": {"bucket": "models", "credentials": {"secretName": "canary-s3-secret"}}}
        config = run_config(**{"model": model, "output": output} | sections)
        resolved = Resolved(
            model_revision="c0ffee", dataset_digest="d" * 64, rows=40, adapted_share=0.114, quantized_share=1.0
        ).model_copy(update=dict(chosen or {}))
        (tmp_path / "tiny-Q8_0.gguf").touch()
        artifacts = [
            LocalArtifact(ArtifactType.MERGED, tmp_path, "safetensors", "BF16"),
            LocalArtifact(ArtifactType.GGUF, tmp_path / "tiny-Q8_0.gguf", "gguf", "Q8_0"),
        ]
        card, configuration = write_documents(
            *(tmp_path, config, resolved, artifacts),
            model_digest="b" * 64,
            summary=RunSummary(
                metrics={"steps": 2.0, "loss": 1.0, **(used or {})},
                history=HISTORY,
                is_dequantised=is_dequantised,
                base_dropout=base_dropout,
            ),
        )
        return (card.path / "README.md").read_text(), configuration.path.read_text()

    return build


def test_the_card_says_base_data_metrics_and_commands(documents: Callable[..., tuple[str, str]]) -> None:
    text, _ = documents()
    card = ModelCard(text)
    assert card.data.base_model == "acme/base"
    assert card.data.base_model_relation == "finetune"
    assert "gguf" in card.data.tags
    for part in (
        "`c0ffee`",
        "b" * 64,
        "d" * 64,
        "| loss | 1 |",
        "Of the layers' weights, 11.4% have an adapter; 100.0% were in NF4 while training.",
        "![Loss by step](loss.svg)",
        "vllm serve acme/base --enable-lora --max-lora-rank 8 --lora-modules tiny=./adapter \\\n",
        "  --tokenizer ./adapter --generation-config ./adapter\n",
        "vllm serve ./merged",
        "llama-cli -m gguf/tiny-Q8_0.gguf",
        "ollama create tiny -f gguf/tiny-Q8_0.Modelfile",
    ):
        assert part in text


def test_the_card_says_gpu_time_and_energy_where_they_were_measured(documents: Callable[..., tuple[str, str]]) -> None:
    measured = TrainingOutcome(2, 1.0, None, gpu_seconds=5040, energy_watt_hours=841.25).metrics()
    text, _ = documents(used=measured)
    assert "| gpuSeconds | 5040 |\n| energyWattHours | 841.25 |" in text
    assert "GPU time and energy are those of the pod that finished, up to the end of training; the job" in text

    without = TrainingOutcome(2, 1.0, None, gpu_seconds=5040).metrics()
    assert "GPU time are those" not in (text := documents(used=without)[0])
    assert "GPU time is that of the pod that finished" in text
    assert "nergy" not in text, "absent, and not zero"
    assert "GPU time" not in documents()[0], "a run on a CPU"


def test_the_card_says_when_weights_were_decoded_from_nf4(documents: Callable[..., tuple[str, str]]) -> None:
    said = "The base exists in NF4 only: merged weights and GGUF files hold its decoded weights"
    assert said in documents(is_dequantised=True)[0]
    assert said not in documents()[0]


def test_the_card_says_which_dropout_of_the_base_was_switched_off(documents: Callable[..., tuple[str, str]]) -> None:
    said = "the base model's configuration has dropout of its own, which is switched off"
    assert f"\nAbout the training: {said}.\n" in documents(base_dropout=said)[0]
    assert "About the training" not in documents()[0]


def test_the_card_says_in_which_precision_a_job_that_asks_for_fp8_was_trained(
    documents: Callable[..., tuple[str, str]],
) -> None:
    text, configuration = documents(chosen={"precision": "BF16", "precision_reason": "FP8 until step 20: it changes"})
    assert "\nFrozen weights were multiplied in BF16: FP8 until step 20: it changes.\n" in text
    assert "precisionReason: 'FP8 until step 20: it changes'" in configuration
    assert "were multiplied in" not in documents(chosen={"precision": "BF16"})[0], "a job that asks for nothing"


def test_a_pushed_model_has_commands_for_its_repository(documents: Callable[..., tuple[str, str]]) -> None:
    hub = {"repository": "acme/bot", "credentials": {"secretName": "canary-secret"}}
    text, _ = documents(output={"s3": {"bucket": "models"}, "hub": hub})
    for part in ("vllm serve acme/bot", "llama-server -hf acme/bot:Q8_0", "ollama run hf.co/acme/bot:Q8_0"):
        assert part in text
    assert "canary" not in text
    assert "hf.co" not in documents()[0]


def test_resolved_yaml_holds_the_whole_run_and_no_secret(documents: Callable[..., tuple[str, str]]) -> None:
    card, text = documents()
    found = yaml.safe_load(text)
    assert found["resolved"]["modelRevision"] == "c0ffee"
    assert found["resolved"]["modelDigest"] == "b" * 64
    assert found["training"]["seed"] == 3407
    assert re.fullmatch(r"[0-9.]+", found["versions"]["transformers"])
    assert re.fullmatch(r"[0-9a-f]{64}", found["specDigest"])
    assert "canary" not in text + card
    assert "hf://acme/base" in text, "the section that held the credentials is there"


def test_a_template_in_the_configuration_cannot_end_its_code_block(documents: Callable[..., tuple[str, str]]) -> None:
    template = "```\n# Injected\n{% for m in messages %}{{ m['content'] }}{% endfor %}"
    text, _ = documents(model={"source": "hf://acme/base", "chatTemplate": template})
    fence = re.findall(r"^(`{3,})yaml$", text, re.MULTILINE)[0]
    assert len(fence) > 3
    assert text.rstrip().endswith(f"\n{fence}")
    assert text.count(f"\n{fence}\n") == 1, "only its end is left"


def test_the_card_shows_what_differs_from_the_defaults_and_no_local_path(run_config: Builder, tmp_path: Path) -> None:
    claim = {"source": "pvc://team-claim/secret-place/rows.jsonl", "credentials": {"secretName": "canary-secret"}}
    config = run_config(model={"source": f"file://{tmp_path}/my-base", "chatTemplateName": "Gemma"}, dataset=claim)
    card, configuration = write_documents(
        *(tmp_path / "documents", config, Resolved(dataset_digest="d" * 64), []),
        model_digest="b" * 64,
        summary=RunSummary(metrics={"loss": 1.0}, metric_lines=LINES, failed_exports=["GGUF Q8_0: no conversion"]),
    )[:2]
    text = (card.path / "README.md").read_text()
    for hidden in (str(tmp_path), "secret-place", "canary", "seed"):
        assert hidden not in text
    assert str(tmp_path) in configuration.path.read_text()

    shown = yaml.safe_load(text.partition("yaml\n")[2].partition("```")[0])
    assert shown["model"] == {
        "source": "my-base (not public)", "chatTemplateName": "Gemma", "maxSequenceLength": 128
    }  # fmt: skip
    assert shown["dataset"] == {"source": "rows.jsonl (not public)"}
    assert shown["adapter"] == {"rank": 4}
    assert "> **Not made:** GGUF Q8_0: no conversion" in text
    assert "a CPU: 1 h 2 min from the first logged step to the last, 1,500 tokens a second." in text


@pytest.mark.parametrize("merged", [True, False])
def test_the_python_of_the_card_runs(
    run_config: Builder, tiny_base: Path, tmp_path: Path, merged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    if merged:
        shutil.copytree(tiny_base, folder / "merged")
    else:
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "adapter")
        AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder / "adapter")
    artifacts = [LocalArtifact(ArtifactType.MERGED, folder / "merged", "safetensors", "BF16")] if merged else []
    config = run_config(model={"source": f"file://{tiny_base}"})
    card, _ = write_documents(
        *(tmp_path / "documents", config, Resolved(dataset_digest="d" * 64), artifacts),
        model_digest="b" * 64,
        summary=RunSummary(metrics={}),
    )[:2]

    code = (card.path / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    runnable = code.replace('"BASE_MODEL_FOLDER"', repr(str(tiny_base)))
    with contextlib.chdir(folder):
        exec(compile(runnable, "card", "exec"), {})
    assert capsys.readouterr().out.strip(), "an answer"


def test_the_plot_is_svg_with_both_lines_inside_its_frame() -> None:
    root = ElementTree.fromstring(render_loss_plot("Loss of <b>&", HISTORY * 2))
    assert root.find("svg:title", NAMESPACE).text == "Loss of <b>&"  # type: ignore[union-attr]
    paths = [path.get("d", "") for path in root.findall("svg:path", NAMESPACE) if path.get("fill") == "none"]
    assert len(paths) == 2
    places = [tuple(map(float, place.split())) for path in paths for place in path[1:].split("L")]
    assert all(64 <= x <= 704 and 40 <= y <= 316 for x, y in places)
    higher, lower = places[0], places[1]
    assert higher[1] < lower[1], "a larger loss stands higher, which is a smaller y"


@pytest.mark.parametrize("losses", [[3.0], [3.0, 3.0], [0.0, 0.0], [1e-9, 2e-9], [1e6, 0.1], [-1.0, 2.0]])
def test_any_losses_can_be_drawn(losses: list[float]) -> None:
    text = render_loss_plot("x", [LossPoint(step + 1, loss) for step, loss in enumerate(losses)])
    assert "nan" not in text
    ElementTree.fromstring(text)


def test_a_plot_has_steps_to_read_and_a_smoothed_line_over_noise() -> None:
    points = [LossPoint(step, 2 + (-1) ** step) for step in range(1, 201)]
    evaluation = [LossPoint(step, 2.0, is_evaluation=True) for step in (100, 200)]
    root = ElementTree.fromstring(render_loss_plot("x", points + evaluation))
    said = [text.text for text in root.findall("svg:text", NAMESPACE)]
    assert {"0", "50", "100", "150", "200", "evaluation", "training (bold: smoothed)"} <= set(said)

    raw, smooth = (path.get("d", "") for path in root.findall("svg:path", NAMESPACE) if path.get("stroke") == "#3b6ea5")
    heights = [[float(place.split()[1]) for place in path[1:].split("L")[40:-40]] for path in (raw, smooth)]
    assert max(heights[1]) - min(heights[1]) < 0.2 * (max(heights[0]) - min(heights[0]))
    titles = [title.text for title in root.findall("svg:circle/svg:title", NAMESPACE)]
    assert titles == ["step 100: 2", "step 200: 2"], "training has too many points for dots"


@pytest.mark.parametrize(
    ("last", "ticks"), [(1, [0, 1]), (7, [0, 2, 4, 6, 7]), (60, [0, 20, 40, 60]), (103, [0, 50, 100])]
)
def test_steps_on_the_axis_are_round(last: int, ticks: list[int]) -> None:
    text = render_loss_plot("x", [LossPoint(last, 1.0)])
    assert [int(step) for step in re.findall(r'text-anchor="middle">([0-9,]+)<', text)] == ticks


def test_a_long_run_stays_a_small_file() -> None:
    text = render_loss_plot("x", [LossPoint(step, 1 / step) for step in range(1, 100_001)])
    assert len(text) < 40_000
    assert "L704.0 " in text, "the last point is there"
