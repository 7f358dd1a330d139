"""Runs the whole preflight. All that can be checked is checked, whatever else failed, so that errors come together."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from finetune_api.run_config import RunConfig
from finetune_trainer.artifacts.existing import Inputs
from finetune_trainer.artifacts.hub_push import open_hub
from finetune_trainer.artifacts.store import ArtifactStore, open_store
from finetune_trainer.chat.new_tokens import FIELD as NEW_TOKENS
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.base_model.companions import companions_of_training
from finetune_trainer.export.base_model.full_config import read_full_config
from finetune_trainer.export.base_model.tokenizer_files import TokenizerFiles
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.source_access import access_source
from finetune_trainer.model.adapter_targets import LinearLayers, check_expert_targets, choose_targets
from finetune_trainer.model.base_models import find_base_model_sign
from finetune_trainer.model.configuration.dropout import dropout_rates
from finetune_trainer.model.configuration.reading import read_published_config
from finetune_trainer.model.description import (
    check_architecture,
    load_configuration,
    load_tokenizer,
    read_written_config,
)
from finetune_trainer.model.layer_weights import RENAMED_TYPES, known_experts, layer_weights
from finetune_trainer.model.published_weights import PublishedWeights, describe_published
from finetune_trainer.model.safetensors_header import TensorHeader
from finetune_trainer.preflight.examination import Data, describe_scan, examine, scan_source
from finetune_trainer.preflight.findings import Findings, ModelFacts
from finetune_trainer.preflight.html import render_html
from finetune_trainer.preflight.judgements.dropout import judge_dropout
from finetune_trainer.preflight.judgements.export import judge_gguf, judge_merge
from finetune_trainer.preflight.judgements.new_tokens import plan_vocabulary
from finetune_trainer.preflight.judgements.rows import EVALUATION, judge_evaluation
from finetune_trainer.preflight.process_memory import release_freed_memory
from finetune_trainer.preflight.report import Report
from finetune_trainer.preflight.scan import Scan
from finetune_trainer.sources import (
    FetchedSource,
    SourceAccess,
    fetch_dataset,
    fetch_model_configuration,
    fetch_weight_headers,
)
from finetune_trainer.storage.object_store import ignore_bytes

FOLDER = "preflight"


def run_preflight(config: RunConfig, settings: Settings) -> tuple[Report, tuple[str, ...]]:
    """Checks the job and writes the report beside its results.

    Returns the report, and the URIs of its files: none if the output cannot be written, which is a finding then.
    """
    findings = Findings()
    store = open_store(config, settings.attempt_id, settings.credentials_of("output"), settings.output_folder)
    try:
        writable = findings.attempt("spec.output.s3", lambda: _check_output(store)) is not None
        findings.attempt("spec.output.hub", lambda: _check_hub(config, settings))
        model = findings.attempt("spec.model.source", lambda: _fetch_model(config, settings, findings))
        data = findings.attempt("spec.dataset.source", lambda: _fetch_data(config, settings))

        evaluation = _fetch_evaluation(config, settings, findings)
        inputs = _identify(config, model, data, evaluation)
        writable = writable and findings.attempt("spec.output.s3", lambda: _check_existing(store, inputs)) is not None

        scan = _scan_evaluation(evaluation, config, model, findings) if evaluation is not None else None
        report = examine(config, model, Data(data, scan), findings)
        written = _write(store, report, settings.work) if writable else ()
    finally:
        store.close()
    return report, written


def _check_output(store: ArtifactStore) -> bool:
    store.probe()
    return True


def _check_existing(store: ArtifactStore, inputs: Inputs | None) -> bool:
    store.find_existing(lambda: inputs)
    return True


def _identify(
    config: RunConfig, model: ModelFacts | None, data: FetchedSource | None, evaluation: FetchedSource | None
) -> Inputs | None:
    """The identity of the inputs; None if one of them could not be fetched."""
    lacks_evaluation = config.dataset.evaluation_source() is not None and evaluation is None
    if model is None or data is None or lacks_evaluation:
        return None
    return Inputs(model.version, data.digest, evaluation.digest if evaluation else None)


def _check_hub(config: RunConfig, settings: Settings) -> None:
    hub = open_hub(config.output.hub, settings.credentials_of("hub"))
    if hub is not None:
        hub.prepare()


def _fetch_model(config: RunConfig, settings: Settings, findings: Findings) -> ModelFacts:
    """Fetches the model's small files, and checks them each on its own."""
    access = access_source(config, settings, "model")
    spec = config.model
    fetched = fetch_model_configuration(spec.source, spec.revision, settings.work / "model", access)

    # A wrong architecture and a wrong tokenizer are two errors; both are reported.
    architecture = findings.attempt("spec.model.source", lambda: check_architecture(fetched.folder))
    tokenizer = findings.attempt("spec.model.source", lambda: load_tokenizer(fetched.folder, spec))
    release_freed_memory()

    configuration = load_configuration(fetched.folder) if architecture else None
    if architecture:
        rates = dropout_rates(read_published_config(fetched.folder))
        findings.found += judge_dropout(rates, config.adapter.dropout)
    published = _fetch_weights(config, fetched, access, findings)
    weights = _judge_weights(config, published, configuration, findings)
    sign = find_base_model_sign(fetched.folder, spec.source)
    identity = (fetched.revision, fetched.version, architecture)
    facts = ModelFacts(*identity, configuration, tokenizer, sign, weights, published)
    if spec.new_tokens and configuration is not None and tokenizer is not None:
        facts = findings.attempt(NEW_TOKENS, partial(_with_new_tokens, facts, spec.new_tokens)) or facts

    stored = () if published is None else published.own
    findings.found += judge_merge(config, getattr(configuration, "model_type", None), weights, stored)
    if config.export.gguf and architecture and tokenizer is not None:
        beside = settings.work / "tokenizer"
        findings.attempt("spec.export.gguf", lambda: _check_gguf(config, beside, fetched.folder, facts, findings))
    return facts


def _with_new_tokens(facts: ModelFacts, texts: Sequence[str]) -> ModelFacts:
    """The facts about the model with rows for new tokens."""
    grown = plan_vocabulary(texts, facts.tokenizer, facts.configuration, facts.weights)
    return replace(facts, configuration=grown.configuration, weights=grown.weights, new_tokens=grown.sentence)


def _check_gguf(config: RunConfig, work: Path, model: Path, facts: ModelFacts, findings: Findings) -> None:
    """Judges the conversion to GGUF with the tokenizer that would lie beside the adapter."""
    beside = companions_of_training(model, facts.tokenizer, config.model)
    beside.write(work, facts.tokenizer)
    rows = facts.configuration.vocab_size if facts.new_tokens and facts.configuration is not None else None
    full, files = read_full_config(model) | ({} if rows is None else {"vocab_size": rows}), TokenizerFiles(work)
    findings.found += judge_gguf(config.export.gguf, full, beside.generation_config, files, facts.weights)
    release_freed_memory()


def _fetch_weights(
    config: RunConfig, model: FetchedSource, access: SourceAccess, findings: Findings
) -> PublishedWeights | None:
    """Reads the headers of the model's weight files; None if they, or its config.json, cannot be read."""
    spec = config.model
    read = partial(fetch_weight_headers, spec.source, model.revision or spec.revision, access)
    headers = findings.attempt("spec.model.source", read)
    try:
        written = read_written_config(model.folder)
    except TrainerError:  # check_architecture has reported it
        return None
    if headers is None:
        return None
    return findings.attempt("spec.model.source", partial(describe_published, headers, written))


def _judge_weights(
    config: RunConfig, published: PublishedWeights | None, configuration: Any, findings: Findings
) -> tuple[TensorHeader, ...] | None:
    """Checks that the layers of the adapter exist; returns the headers of the language model's weights.

    None if they cannot be read, or if their names are not those of the loaded model.
    """
    model_type = getattr(configuration, "model_type", None)
    if published is None or model_type in RENAMED_TYPES:
        return None

    weights = layer_weights(published.own, quantized=False, model_type=model_type)
    experts = next(iter(known_experts(published.own, model_type).values()), None)
    layers = LinearLayers.of(weights, model_type, experts)
    choose = partial(choose_targets, layers, config.adapter.target_modules)
    findings.attempt("spec.adapter.targetModules", choose)
    findings.attempt("spec.adapter", partial(check_expert_targets, experts, config.adapter))
    return published.own


def _fetch_data(config: RunConfig, settings: Settings) -> FetchedSource:
    access = access_source(config, settings, "dataset")
    spec = config.dataset
    return fetch_dataset(spec.source, spec.split, settings.work / "data", access, ignore_bytes, spec.subset)


def _fetch_evaluation(config: RunConfig, settings: Settings, findings: Findings) -> FetchedSource | None:
    """Fetches the evaluation source; None if there is none, or if it cannot be read."""
    source = config.dataset.evaluation_source()
    if source is None:
        return None

    access = access_source(config, settings, "dataset")
    work, subset = settings.work / "evaluation", config.dataset.evaluation_subset()
    return findings.attempt(EVALUATION, lambda: fetch_dataset(*source, work, access, ignore_bytes, subset))


def _scan_evaluation(data: FetchedSource, config: RunConfig, model: ModelFacts | None, findings: Findings) -> Scan:
    """Judges the rows of an evaluation source like those that train; returns the scan of them."""
    # maxSamples limits the rows that train, not those to evaluate on.
    spec = config.dataset.model_copy(update={"max_samples": None})
    scan = scan_source(data, spec, model, config)
    findings.judge_rows(scan, config, EVALUATION)
    tokens = describe_scan(scan, config)
    findings.found += judge_evaluation(tokens, config.model.max_sequence_length, oversized=scan.oversized)
    return scan


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
