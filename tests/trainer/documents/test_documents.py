"""Model card, loss plot and resolved.yaml of a run, read back by those who read them: the Hub's parser, XML, YAML."""

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard

from finetune_api.progress import Resolved
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import ArtifactType
from finetune_trainer.artifacts.store import LocalArtifact
from finetune_trainer.documents.loss_plot import render_loss_plot
from finetune_trainer.documents.write import RunSummary, write_documents
from finetune_trainer.training.records import LossPoint

Builder = Callable[..., RunConfig]
HISTORY = [LossPoint(1, 2.0), LossPoint(2, 1.0), LossPoint(2, 1.5, is_evaluation=True)]
NAMESPACE = {"svg": "http://www.w3.org/2000/svg"}


@pytest.fixture
def documents(run_config: Builder, tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Builder of (card, resolved.yaml) for a job on a Hub model."""

    def build(*, is_dequantised: bool = False, **sections: dict[str, object]) -> tuple[str, str]:
        model = {"source": "hf://acme/base", "credentials": {"secretName": "canary-hub-secret"}}
        output = {"s3": {"bucket": "models", "credentials": {"secretName": "canary-s3-secret"}}}
        config = run_config(**{"model": model, "output": output} | sections)
        resolved = Resolved(
            model_revision="c0ffee", dataset_digest="d" * 64, rows=40, adapted_share=0.114, quantized_share=1.0
        )
        (tmp_path / "tiny-Q8_0.gguf").touch()
        artifacts = [
            LocalArtifact(ArtifactType.MERGED, tmp_path, "safetensors", "BF16"),
            LocalArtifact(ArtifactType.GGUF, tmp_path / "tiny-Q8_0.gguf", "gguf", "Q8_0"),
        ]
        card, configuration = write_documents(
            *(tmp_path, config, resolved, artifacts),
            model_digest="b" * 64,
            summary=RunSummary(metrics={"steps": 2.0, "loss": 1.0}, history=HISTORY, is_dequantised=is_dequantised),
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
        "vllm serve acme/base --enable-lora --max-lora-rank 8 --lora-modules tiny=./adapter",
        "vllm serve ./merged",
        "llama-cli -m gguf/tiny-Q8_0.gguf",
        "ollama create tiny -f gguf/tiny-Q8_0.Modelfile",
    ):
        assert part in text


def test_the_card_says_when_weights_were_decoded_from_nf4(documents: Callable[..., tuple[str, str]]) -> None:
    said = "The base exists in NF4 only: merged weights and GGUF files hold its decoded weights"
    assert said in documents(is_dequantised=True)[0]
    assert said not in documents()[0]


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


def test_a_long_run_stays_a_small_file() -> None:
    text = render_loss_plot("x", [LossPoint(step, 1 / step) for step in range(1, 100_001)])
    assert len(text) < 20_000
    assert "L704.0 " in text, "the last point is there"
