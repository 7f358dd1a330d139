"""Runs the whole preflight. All that can be checked is checked, whatever else failed, so that errors come together."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.spec.inputs import DatasetSpec
from finetune_api.vocabulary import OnBadRow
from finetune_trainer.artifacts.hub_push import open_hub
from finetune_trainer.artifacts.store import ArtifactStore, open_store
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.settings import Settings
from finetune_trainer.model.adapter_targets import choose_targets
from finetune_trainer.model.description import (
    check_architecture,
    embedding_rows,
    linear_names,
    load_configuration,
    load_tokenizer,
)
from finetune_trainer.preflight.gpu import estimate_gpu, judge_gpu
from finetune_trainer.preflight.html import render_html
from finetune_trainer.preflight.judgements import FIELD_OF, judge_answer_ends, judge_rows, judge_tokens
from finetune_trainer.preflight.process_memory import release_freed_memory
from finetune_trainer.preflight.report import Finding, Report, RowCounts, TokenStatistics
from finetune_trainer.preflight.scan import Scan, scan_rows
from finetune_trainer.preflight.statistics import describe_tokens
from finetune_trainer.preflight.steps import TrainingSize, training_size
from finetune_trainer.sources import FetchedSource, SourceAccess, fetch_dataset, fetch_model_configuration
from finetune_trainer.storage.object_store import ignore_bytes

log = logging.getLogger(__name__)
Value = TypeVar("Value")
FOLDER = "preflight"
EVALUATION = "spec.dataset.evaluation"


@dataclass
class _Findings:
    """Errors and warnings as they are found."""

    found: list[Finding] = field(default_factory=list)
    unlisted: int = 0
    """Bad rows beyond those in `found`: they count as errors, too."""

    def attempt(self, location: str, action: Callable[[], Value]) -> Value | None:
        """The action's value; if it fails, None, and the error is noted for `location`."""
        try:
            return action()
        except TrainerError as failure:
            if failure.reason is FailureReason.INTERRUPTED:
                raise
            self.found.append(Finding.error(FIELD_OF.get(failure.reason, location), failure.message, failure.reason))
            return None

    def judge_rows(self, scan: Scan, config: RunConfig, *source: str) -> None:
        self.found += judge_rows(scan, config, *source)
        if config.dataset.on_bad_row is OnBadRow.FAIL:
            self.unlisted += scan.unlisted_bad


@dataclass(frozen=True)
class _Model:
    """Facts about the model that need no weights."""

    revision: str | None
    architecture: str | None
    configuration: Any | None
    """transformers' configuration of the language model."""
    tokenizer: Any | None


def run_preflight(config: RunConfig, settings: Settings) -> tuple[Report, tuple[str, ...]]:
    """Checks the job and writes the report beside its results.

    Returns the report, and the URIs of its files: none if the output cannot be written, which is a finding then.
    """
    findings = _Findings()
    store = open_store(config, settings.attempt_id, settings.credentials_of("output"), settings.output_folder)
    try:
        writable = findings.attempt("spec.output.s3", lambda: _check_output(store, config)) is not None
        findings.attempt("spec.output.hub", lambda: _check_hub(config, settings))
        model = findings.attempt("spec.model.source", lambda: _fetch_model(config, settings, findings))
        data = findings.attempt("spec.dataset.source", lambda: _fetch_data(config, settings))

        _check_evaluation(config, settings, model, findings)
        report = _examine(config, model, data, findings)
        written = _write(store, report, settings.work) if writable else ()
    finally:
        store.close()
    return report, written


def _check_output(store: ArtifactStore, config: RunConfig) -> bool:
    store.probe()
    store.find_existing(config.spec_digest())
    return True


def _check_hub(config: RunConfig, settings: Settings) -> None:
    hub = open_hub(config.output.hub, settings.credentials_of("hub"))
    if hub is not None:
        hub.prepare()


def _fetch_model(config: RunConfig, settings: Settings, findings: _Findings) -> _Model:
    """Fetches the model's small files, and checks them each on its own."""
    access = _access(config, settings, "model", settings.model_mount)
    spec = config.model
    fetched = fetch_model_configuration(spec.source, spec.revision, settings.work / "model", access)

    # A wrong architecture and a wrong tokenizer are two errors; both are reported.
    architecture = findings.attempt("spec.model.source", lambda: check_architecture(fetched.folder))
    tokenizer = findings.attempt("spec.model.source", lambda: load_tokenizer(fetched.folder, spec))
    release_freed_memory()

    configuration = load_configuration(fetched.folder) if architecture else None
    if names := linear_names(fetched.folder):
        findings.attempt("spec.adapter.targetModules", lambda: choose_targets(names, config.adapter.target_modules))
    return _Model(fetched.revision, architecture, configuration, tokenizer)


def _fetch_data(config: RunConfig, settings: Settings) -> FetchedSource:
    access = _access(config, settings, "dataset", settings.dataset_mount)
    spec = config.dataset
    return fetch_dataset(spec.source, spec.split, settings.work / "data", access, ignore_bytes, spec.subset)


def _check_evaluation(config: RunConfig, settings: Settings, model: _Model | None, findings: _Findings) -> None:
    """Judges the rows of an evaluation source like those that train."""
    source = config.dataset.evaluation_source()
    if source is None:
        return

    access = _access(config, settings, "dataset", settings.dataset_mount)
    work, subset = settings.work / "evaluation", config.dataset.evaluation_subset()
    data = findings.attempt(EVALUATION, lambda: fetch_dataset(*source, work, access, ignore_bytes, subset))
    if data is not None:
        # maxSamples limits the rows that train, not those to evaluate on.
        spec = config.dataset.model_copy(update={"max_samples": None})
        findings.judge_rows(_scan(data, spec, model, config), config, EVALUATION)


def _access(config: RunConfig, settings: Settings, use: str, mount: Path | None) -> SourceAccess:
    s3 = config.output.s3
    return SourceAccess(settings.credentials_of(use), s3.endpoint_url, s3.region, mount)


def _examine(config: RunConfig, model: _Model | None, data: FetchedSource | None, findings: _Findings) -> Report:
    """The report on whatever could be fetched of model and data."""
    facts: dict[str, Any] = {
        "job": f"{config.job.namespace}/{config.job.name}",
        "model_source": config.model.source,
        "model_revision": model.revision if model else None,
        "architecture": model.architecture if model else None,
        "dataset_source": config.dataset.source,
        "dataset_digest": data.digest if data else None,
        "max_sequence_length": config.model.max_sequence_length,
    }

    size: TrainingSize | None = None
    if data is not None:
        scan = _scan(data, config.dataset, model, config)
        facts |= _examine_rows(scan, model, config, findings)
        size = _training_size(scan, config)
    if size is not None:
        facts |= {"optimizer_steps": size.steps, "training_tokens": size.tokens}

    if model is not None and model.configuration is not None:
        estimate = estimate_gpu(config, model.configuration, size)
        findings.found += judge_gpu(config, model.configuration, size, estimate)
        facts |= {"gpu": estimate}

    ordered = sorted(findings.found, key=lambda finding: not finding.location.startswith("spec."))  # fields, then rows
    return Report(**facts, findings=tuple(ordered), more_errors=findings.unlisted)


def _examine_rows(scan: Scan, model: _Model | None, config: RunConfig, findings: _Findings) -> dict[str, Any]:
    """The report's fields about the rows; findings about them are added."""
    limit = config.model.max_sequence_length
    counts = _count(scan)
    tokens = _describe(scan, limit)

    findings.judge_rows(scan, config)
    findings.found += judge_tokens(counts, tokens, limit)
    findings.found += judge_answer_ends(scan, model.tokenizer if model else None)

    return {
        "rows": counts,
        "tokens": tokens,
        "tokens_complete": scan.measured.is_complete and not scan.oversized,
        "samples": tuple(scan.samples),
        "dataset_format": scan.layout,
        "dataset_detection": scan.detection,
    }


def _scan(data: FetchedSource, spec: DatasetSpec, model: _Model | None, config: RunConfig) -> Scan:
    tokenizer = model.tokenizer if model else None
    rows = embedding_rows(model.configuration) if model else None
    return scan_rows(data.files, spec, tokenizer, config.model.max_sequence_length, rows)


def _count(scan: Scan) -> RowCounts:
    return RowCounts(
        total=scan.rows,
        bad=scan.bad,
        duplicates=scan.duplicates.duplicates(),
        duplicates_complete=scan.duplicates.is_complete,
        oversized=scan.oversized,
        refused=scan.refused,
    )


def _describe(scan: Scan, limit: int) -> TokenStatistics | None:
    """Statistics of the sample, with the longest row even if it is not in the sample."""
    rows = scan.measured.rows
    tokens = describe_tokens([row.length for row in rows], [row.supervised for row in rows], limit)
    return tokens.model_copy(update={"max": max(tokens.max, scan.max_length)}) if tokens else None


def _training_size(scan: Scan, config: RunConfig) -> TrainingSize | None:
    """The size of the training; None if no row trains."""
    limit = config.model.max_sequence_length
    lengths = [min(row.length, limit) for row in scan.measured.rows if row.supervised]
    if not lengths:
        return None

    # The sample's share of rows that train stands for that of all rows.
    usable = round((scan.rows - scan.bad) * len(lengths) / len(scan.measured.rows))
    longest = limit if scan.oversized else max(scan.max_length, *lengths)
    return training_size(lengths, usable, longest, config.dataset, config.training, limit)


def _write(store: ArtifactStore, report: Report, work: Path) -> tuple[str, ...]:
    """Writes and uploads the report; returns the URIs of its files."""
    folder = work / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(report.model_dump_json(by_alias=True, indent=2), encoding="utf-8")
    (folder / "report.html").write_text(render_html(report), encoding="utf-8")

    names = ("report.html", "report.json")
    for name in names:
        store.object_store.put_file(f"{FOLDER}/{name}", folder / name, ignore_bytes)
    return tuple(store.object_store.uri(f"{FOLDER}/{name}") for name in names)
