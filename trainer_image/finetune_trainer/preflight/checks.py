"""The whole preflight. What can be checked is checked, whatever else failed, so that all errors come together."""

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
from finetune_trainer.preflight.process_memory import release_freed_memory
from finetune_trainer.preflight.report import Finding, Report, RowCounts, Severity, TokenStatistics
from finetune_trainer.preflight.scan import Scan, scan_rows
from finetune_trainer.preflight.statistics import describe_tokens
from finetune_trainer.preflight.steps import TrainingSize, training_size
from finetune_trainer.sources import FetchedSource, SourceAccess, fetch_dataset, fetch_model_configuration
from finetune_trainer.storage.object_store import ignore_bytes

log = logging.getLogger(__name__)
Value = TypeVar("Value")
FOLDER = "preflight"
EVALUATION = "spec.dataset.evaluation"
WITH_CONTROL_TOKENS = (
    "spell out control tokens, which are trained as plain text; where they are meant, write rows of format Text that "
    "hold the whole conversation as the model sees it"
)
MANY = 0.2  # share of rows that is worth a warning
FIELD_OF = {
    FailureReason.CHAT_TEMPLATE_MISSING: "spec.model.chatTemplate",
    FailureReason.INVALID_CHAT_TEMPLATE: "spec.model.chatTemplate",
}


@dataclass
class _Findings:
    """Errors and warnings as they are found."""

    found: list[Finding] = field(default_factory=list)
    unnamed: int = 0
    """Errors that are counted only."""

    def attempt(self, place: str, action: Callable[[], Value]) -> Value | None:
        """The action's value; None where it failed, which is noted then."""
        try:
            return action()
        except TrainerError as error:
            if error.reason is FailureReason.INTERRUPTED:
                raise
            self.error(FIELD_OF.get(error.reason, place), error.message, error.reason)
            return None

    def error(self, place: str, message: str, reason: FailureReason) -> None:
        said = message.removeprefix(f"{place}: ")
        self.found.append(Finding(severity=Severity.ERROR, location=place, message=said, reason=reason))

    def warn(self, place: str, message: str) -> None:
        self.found.append(Finding(severity=Severity.WARNING, location=place, message=message))


@dataclass(frozen=True)
class _Model:
    """What is known of the model without its weights."""

    revision: str | None
    architecture: str | None
    configuration: Any | None
    """transformers' configuration of the text model."""
    tokenizer: Any | None


def run_preflight(config: RunConfig, settings: Settings) -> tuple[Report, tuple[str, ...]]:
    """Check the job and write the report beside its results; returns the report and where its files are (none where
    the output cannot be written, which is one of the findings then)."""
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
    access = _access(config, settings, "model", settings.model_mount)
    spec = config.model
    fetched = fetch_model_configuration(spec.source, spec.revision, settings.work / "model", access)
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
    """Judge the rows of an evaluation source like those that train."""
    source = config.dataset.evaluation_source()
    if source is None:
        return
    access = _access(config, settings, "dataset", settings.dataset_mount)
    work, subset = settings.work / "evaluation", config.dataset.evaluation_subset()
    data = findings.attempt(EVALUATION, lambda: fetch_dataset(*source, work, access, ignore_bytes, subset))
    if data is not None:
        spec = config.dataset.model_copy(update={"max_samples": None})
        scan = _scan(data, spec, model, config)
        _judge_rows(scan, config, findings, EVALUATION)


def _access(config: RunConfig, settings: Settings, use: str, mount: Path | None) -> SourceAccess:
    s3 = config.output.s3
    return SourceAccess(settings.credentials_of(use), s3.endpoint_url, s3.region, mount)


def _examine(config: RunConfig, model: _Model | None, data: FetchedSource | None, findings: _Findings) -> Report:
    facts: dict[str, Any] = {
        "job": f"{config.job.namespace}/{config.job.name}",
        "model_source": config.model.source,
        "model_revision": model.revision if model else None,
        "architecture": model.architecture if model else None,
        "dataset_source": config.dataset.source,
        "dataset_digest": data.digest if data else None,
        "max_sequence_length": config.model.max_sequence_length,
    }
    scan: Scan | None = None
    if data is not None:
        limit = config.model.max_sequence_length
        scan = _scan(data, config.dataset, model, config)
        counts = _count(scan)
        tokens = _describe(scan, limit)
        _judge_rows(scan, config, findings)
        _judge_tokens(counts, tokens, config, findings)
        _judge_ends(scan, model.tokenizer if model else None, findings)
        complete = scan.measured.is_complete and not scan.oversized
        facts |= {"rows": counts, "tokens": tokens, "tokens_complete": complete, "samples": tuple(scan.samples)}
        facts |= {"dataset_format": scan.layout, "dataset_detection": scan.detection}
    size = _training_size(scan, config) if scan is not None else None
    if size is not None:
        facts |= {"optimizer_steps": size.steps, "training_tokens": size.tokens}
    if model is not None and model.configuration is not None:
        estimate = estimate_gpu(config, model.configuration, size)
        findings.found += judge_gpu(config, model.configuration, size, estimate)
        facts |= {"gpu": estimate}
    ordered = sorted(findings.found, key=lambda finding: not finding.location.startswith("spec."))  # fields, then rows
    return Report(**facts, findings=tuple(ordered), more_errors=findings.unnamed)


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
    rows = scan.measured.rows
    tokens = describe_tokens([row.length for row in rows], [row.supervised for row in rows], limit)
    return tokens.model_copy(update={"max": max(tokens.max, scan.longest)}) if tokens else None


def _judge_rows(scan: Scan, config: RunConfig, findings: _Findings, source: str = "spec.dataset.source") -> None:
    fails = config.dataset.on_bad_row is OnBadRow.FAIL
    for problem in scan.problems:
        if fails:
            findings.error(problem.location, problem.message, problem.reason)
        else:
            findings.warn(problem.location, f"{problem.message} (the row is skipped)")
    if (unnamed := scan.bad - len(scan.problems)) > 0 and fails:
        findings.unnamed += unnamed
    elif unnamed > 0:
        findings.warn(source, f"{unnamed} more rows are skipped; the first are named above")
    if scan.rows_with_control_tokens:
        count, examples = scan.rows_with_control_tokens, ", ".join(scan.control_token_examples)
        more = ", ..." if count > len(scan.control_token_examples) else ""
        findings.warn(source, f"{count} rows ({examples}{more}) {WITH_CONTROL_TOKENS}")
    if (stopped := scan.stopped) is not None:
        findings.error(FIELD_OF.get(stopped.reason, stopped.location), stopped.message, stopped.reason)
    elif scan.rows == scan.bad:
        findings.error(source, f"none of {scan.rows} rows can be used", FailureReason.EMPTY_DATASET)


def _judge_tokens(counts: RowCounts, tokens: TokenStatistics | None, config: RunConfig, findings: _Findings) -> None:
    source, length = "spec.dataset.source", "spec.model.maxSequenceLength"
    if counts.oversized:
        findings.warn(length, f"{counts.oversized} rows have over a million characters: they were not encoded here")
    if counts.duplicates > MANY * counts.total:
        findings.warn(source, f"{counts.duplicates} of {counts.total} rows repeat an earlier row")
    if tokens is None:
        return
    limit = config.model.max_sequence_length
    if tokens.unsupervised_row_share == 1 and not counts.oversized:
        message = f"no token with loss is left within {limit} tokens in any of {tokens.rows} encoded rows"
        findings.error("spec.dataset.trainOn", message, FailureReason.NO_SUPERVISED_TOKENS)
    elif tokens.unsupervised_row_share > 0:
        findings.warn(length, f"{tokens.unsupervised_row_share:.1%} of rows are left out: their answers are cut off")
    if tokens.truncated_share > MANY:
        findings.warn(length, f"{tokens.truncated_share:.1%} of rows are longer than {limit} tokens and are cut")


def _judge_ends(scan: Scan, tokenizer: Any | None, findings: _Findings) -> None:
    """Warn of a template that never says when an answer is over."""
    if not scan.answers_without_end or tokenizer is None:
        return
    if (end := tokenizer.eos_token) is None:
        message = "ends answers with no control token, and the tokenizer has no end of sequence: the model would never "
        message += "learn to stop; write one into spec.model.chatTemplate, behind each answer"
    else:
        message = f"ends answers with no control token: {end} is added behind the last answer of each row and learned; "
        message += "to end the other answers as well, write it into spec.model.chatTemplate behind each"
    findings.warn("spec.model.chatTemplate", f"the chat template {message}")


def _training_size(scan: Scan, config: RunConfig) -> TrainingSize | None:
    """None where no row trains."""
    limit = config.model.max_sequence_length
    lengths = [min(row.length, limit) for row in scan.measured.rows if row.supervised]
    if not lengths:
        return None
    usable = round((scan.rows - scan.bad) * len(lengths) / len(scan.measured.rows))
    longest = limit if scan.oversized else max(scan.longest, *lengths)
    return training_size(lengths, usable, longest, config.dataset, config.training, limit)


def _write(store: ArtifactStore, report: Report, work: Path) -> tuple[str, ...]:
    folder = work / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(report.model_dump_json(by_alias=True, indent=2), encoding="utf-8")
    (folder / "report.html").write_text(render_html(report), encoding="utf-8")
    names = ("report.html", "report.json")
    for name in names:
        store.object_store.put_file(f"{FOLDER}/{name}", folder / name, ignore_bytes)
    return tuple(store.object_store.uri(f"{FOLDER}/{name}") for name in names)
