"""The figures, the configuration and the samples of two results, as rows of text. Pure."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from finetune_api.vocabulary import ArtifactType
from finetune_client.terminal.sparkline import draw_sparkline
from finetune_trainer.artifacts.manifest import Manifest, ManifestArtifact
from finetune_trainer.cli.compare.read_result import ReadResult

Row = tuple[str, str, str]
WIDTH = 24
"""Blocks of a sparkline."""
ABSENT = "-"
# Of the job and the cluster, not of what was trained.
UNCOMPARED = ("job", "progress", "output", "checkpointsToKeep", "terminationGracePeriodSeconds")
RESOLVED = {
    "architecture": "architecture",
    "device": "device",
    "precision": "precision",
    "rows": "rows",
    "supervisedTokens": "supervised tokens",
    "evaluationRows": "evaluation rows",
    "batchSize": "batch size",
    "trainableParameters": "trainable parameters",
}
METRICS = {
    "steps": "steps",
    "loss": "last loss",
    "evalLoss": "last evaluation loss",
    "bestStep": "best step",
    "bestEvalLoss": "best evaluation loss",
}


def compare_figures(first: ReadResult, second: ReadResult) -> list[Row]:
    """Everything that is a number or a word: origin, metrics, losses of the published weights and loss curves.

    A row that both sides lack is left out.
    """
    sides = (first.manifest, second.manifest)
    rows = [
        _row("made", sides, lambda each: f"{each.created:%Y-%m-%d %H:%M} UTC"),
        _row("model", sides, lambda each: each.model_source),
        _row("data", sides, lambda each: f"{each.dataset_source} {each.dataset_digest[:12]}"),
        *_named(RESOLVED, _part(sides[0], "resolved"), _part(sides[1], "resolved")),
        *_named(METRICS, sides[0].metrics, sides[1].metrics),
        *_judged(sides),
        _curve("loss curve", (first, second), "loss"),
        _curve("evaluation curve", (first, second), "eval_loss"),
        _speed((first, second)),
    ]

    return [row for row in rows if row[1:] != (ABSENT, ABSENT)]


def compare_configuration(first: Manifest, second: Manifest) -> list[Row]:
    """The fields of the configuration that differ, by path."""
    left, right = (dict(_flatten(_part(each, "run"))) for each in (first, second))
    paths = dict.fromkeys([*left, *right])
    found = [(path, _text(left.get(path)), _text(right.get(path))) for path in paths]
    return [row for row in found if row[1] != row[2]]


def compare_samples(first: ReadResult, second: ReadResult) -> list[Row]:
    """The last answers to the prompts that both have, or that either has."""
    left, right = ({line.prompt: line.answer for line in each.samples} for each in (first, second))
    return [(prompt, left.get(prompt, ABSENT), right.get(prompt, ABSENT)) for prompt in dict.fromkeys([*left, *right])]


def _judged(sides: tuple[Manifest, Manifest]) -> Iterator[Row]:
    """Losses of the published weights, each on its own job's rows."""
    yield _row("loss of the base", sides, lambda each: each.judgement.base_loss if each.judgement else None)

    weights = [_weights(each) for each in sides]
    for name in dict.fromkeys([*weights[0], *weights[1]]):
        texts = [_loss(each.get(name)) for each in weights]
        yield (f"loss of {name}", texts[0], texts[1])


def _weights(manifest: Manifest) -> dict[str, ManifestArtifact]:
    kinds = (ArtifactType.ADAPTER, ArtifactType.MERGED)
    named = {each.type.value.lower(): each for each in manifest.artifacts if each.type in kinds and each.loss}
    files = [each for each in manifest.artifacts if each.type is ArtifactType.GGUF and each.loss is not None]
    return named | {str(each.quantization): each for each in files}


def _loss(artifact: ManifestArtifact | None) -> str:
    if artifact is None:
        return ABSENT
    kept = artifact.improvement_kept
    return _text(artifact.loss) + (f" (keeps {kept:.0%})" if kept is not None else "")


def _curve(label: str, sides: tuple[ReadResult, ReadResult], name: str) -> Row:
    texts = []
    for side in sides:
        values = [getattr(line, name) for line in side.metrics if getattr(line, name) is not None]
        ends = f" {values[0]:.4g} to {values[-1]:.4g}" if values else ""
        texts.append(draw_sparkline(values, WIDTH) + ends if values else ABSENT)
    return (label, texts[0], texts[1])


def _speed(sides: tuple[ReadResult, ReadResult]) -> Row:
    texts = []
    for side in sides:
        speeds = [line.tokens_per_second for line in side.metrics if line.tokens_per_second]
        texts.append(f"{speeds[-1]:,.0f}" if speeds else ABSENT)
    return ("tokens/s", texts[0], texts[1])


def _row(label: str, sides: tuple[Manifest, Manifest], value: Callable[[Manifest], Any]) -> Row:
    return (label, _text(value(sides[0])), _text(value(sides[1])))


def _named(labels: Mapping[str, str], first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Row]:
    """A row for each field, under its label."""
    return [(label, _text(first.get(name)), _text(second.get(name))) for name, label in labels.items()]


def _part(manifest: Manifest, name: str) -> Mapping[str, Any]:
    part = manifest.configuration.get(name)
    return part if isinstance(part, dict) else {}


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested mappings, with its path."""
    if not isinstance(value, dict):
        yield path, value
        return
    for name, entry in value.items():
        if path or name not in UNCOMPARED:
            yield from _flatten(entry, f"{path}.{name}" if path else name)


def _text(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) >= 1e-3 or value == 0 else f"{value:g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
