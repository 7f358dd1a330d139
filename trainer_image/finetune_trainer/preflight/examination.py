"""Examines what could be fetched of model and data, and makes the report of it."""

from dataclasses import dataclass
from typing import Any

from finetune_api.run_config import RunConfig
from finetune_api.spec.inputs import DatasetSpec
from finetune_api.vocabulary import Precision
from finetune_kernels.planning.parts.expert_shape import chosen_experts
from finetune_trainer.distributed.driver import find_need
from finetune_trainer.job.machine import free_memory, has_bfloat16
from finetune_trainer.model.cpu_advice import advise_on_cpu
from finetune_trainer.model.description import embedding_rows
from finetune_trainer.model.planned_weights import PlannedWeights, plan_weights
from finetune_trainer.preflight.findings import Findings, ModelFacts
from finetune_trainer.preflight.gpu import estimate_gpu, judge_card, judge_count, judge_driver, judge_gpu
from finetune_trainer.preflight.judgements.batching import judge_batching, pads_rows
from finetune_trainer.preflight.judgements.coverage import judge_coverage, judge_weight_memory
from finetune_trainer.preflight.judgements.disk import judge_disk
from finetune_trainer.preflight.judgements.messages import judge_messages
from finetune_trainer.preflight.judgements.new_tokens import judge_new_tokens
from finetune_trainer.preflight.judgements.reasoning import judge_reasoning
from finetune_trainer.preflight.judgements.rows import judge_answer_ends, judge_tokens
from finetune_trainer.preflight.judgements.training import EvaluationOverlap, PlannedTraining, judge_training
from finetune_trainer.preflight.judgements.unknown_tokens import judge_unknown_tokens
from finetune_trainer.preflight.mixture_gpu import estimate_mixture, judge_mixture
from finetune_trainer.preflight.report import Report, RowCounts, TokenStatistics, WeightCoverage
from finetune_trainer.preflight.scan import Scan, scan_rows
from finetune_trainer.preflight.statistics import describe_tokens
from finetune_trainer.preflight.steps import TrainingSize, training_rows, training_size
from finetune_trainer.sources import FetchedSource


@dataclass(frozen=True)
class Data:
    """The data of a job, as far as they could be fetched."""

    training: FetchedSource | None
    evaluation: Scan | None
    """The scan of an evaluation source of its own."""


def examine(config: RunConfig, model: ModelFacts | None, data: Data, findings: Findings) -> Report:
    """The report on whatever could be fetched of model and data."""
    source = data.training
    facts: dict[str, Any] = {
        "job": f"{config.job.namespace}/{config.job.name}",
        "model_source": config.model.source,
        **(_describe_model(model) if model else {}),
        "dataset_source": config.dataset.source,
        "dataset_digest": source.digest if source else None,
        "max_sequence_length": config.model.max_sequence_length,
    }

    size: TrainingSize | None = None
    if source is not None:
        scan = scan_source(source, config.dataset, model, config)
        facts |= _examine_rows(scan, model, config, findings)
        configuration = model.configuration if model else None
        findings.found += judge_batching(configuration, _trained_lengths(scan, config), config)
        trained = _as_trained(config, configuration)
        size = _training_size(scan, trained)
        if size is not None:
            facts |= {"optimizer_steps": size.steps, "epochs": size.epochs, "training_tokens": size.tokens}
            findings.found += judge_training(_plan(trained, model, size, scan, data.evaluation))

    findings.found += [*judge_count(config), *judge_driver(config, find_need()), *judge_card(config)]
    if model is not None and model.configuration is not None:
        estimate = estimate_gpu(config, model.configuration, size)
        findings.found += judge_gpu(config, model.configuration, size, estimate)
        facts |= {"gpu": estimate} if estimate else {}

    if model is not None and model.weights is not None:
        model_type, each = getattr(model.configuration, "model_type", None), _weight_bytes(config)
        chosen = chosen_experts(model.configuration)
        planned = plan_weights(model.weights, config, model_type, chosen=chosen, each=each)
        if planned is not None and "gpu" not in facts:
            facts |= _examine_mixture(model, planned, config, size, findings)
        facts |= _examine_weights(planned, config, findings, is_planned="gpu" in facts) if planned else {}
        if config.gpus == 0:
            free = free_memory()
            facts["cpu_advice"] = advise_on_cpu(model.weights, config.model.quantization, each=each, free=free)
        if planned is not None:
            tokens = int(size.tokens / max(1.0, size.epochs)) if size else 0
            findings.found += judge_disk(
                config, model.weights, planned.published_parameters, tokens, _copied_bytes(model)
            )

    ordered = sorted(findings.found, key=lambda finding: not finding.location.startswith("spec."))  # fields, then rows
    return Report(**facts, findings=tuple(ordered), more_errors=findings.unlisted)


def _describe_model(model: ModelFacts) -> dict[str, Any]:
    """The report's fields about the model itself."""
    return {
        "model_revision": model.revision,
        "architecture": model.architecture,
        "published_weights": model.published.sentence() if model.published else None,
        "new_tokens": model.new_tokens,
    }


def _examine_rows(scan: Scan, model: ModelFacts | None, config: RunConfig, findings: Findings) -> dict[str, Any]:
    """The report's fields about the rows; findings about them are added."""
    limit = config.model.max_sequence_length
    counts = _count(scan)
    tokens = describe_scan(scan, config)

    findings.judge_rows(scan, config)
    findings.found += judge_tokens(counts, tokens, limit)
    findings.found += judge_answer_ends(scan, model.tokenizer if model else None)
    findings.found += judge_unknown_tokens(scan.measured.rows)
    findings.found += judge_new_tokens(scan.new_tokens.unseen)
    findings.found += judge_reasoning(scan.reasoning)
    findings.found += judge_messages(
        scan.messages, str(model.tokenizer.chat_template) if model and model.tokenizer else ""
    )

    return {
        "rows": counts,
        "tokens": tokens,
        "tokens_complete": scan.measured.is_complete and not scan.oversized,
        "samples": tuple(scan.samples),
        "dataset_format": scan.layout,
        "dataset_detection": scan.detection,
    }


def _examine_mixture(
    model: ModelFacts, planned: PlannedWeights, config: RunConfig, size: TrainingSize | None, findings: Findings
) -> dict[str, Any]:
    """The report's estimate for a mixture of experts; empty for another model."""
    estimate = estimate_mixture(config, model.configuration, planned, size)
    findings.found += judge_mixture(config, model.configuration, planned, size, estimate)
    return {"gpu": estimate} if estimate else {}


def _examine_weights(
    planned: PlannedWeights, config: RunConfig, findings: Findings, *, is_planned: bool
) -> dict[str, Any]:
    """The report's fields about the weights; `is_planned`: the memory plan counts them already."""
    findings.found += judge_coverage(planned, config)
    if not is_planned:
        findings.found += judge_weight_memory(planned, config)

    coverage = WeightCoverage(
        adapted_share=planned.coverage.adapted_share,
        quantized_share=planned.coverage.quantized_share,
        missing_targets=tuple(planned.missing),
        own_targets=tuple(planned.own_default),
        stacked_bytes=planned.coverage.stacked_bytes,
        expert_share=planned.coverage.experts / max(1, planned.coverage.parameters),
        loaded_bytes=planned.loaded_bytes,
    )
    return {"coverage": coverage}


def _copied_bytes(model: ModelFacts) -> int:
    return model.published.copied_bytes if model.published else 0


def _weight_bytes(config: RunConfig) -> int:
    """Bytes of a weight that is not in NF4, in the type that the trainer computes in."""
    precision = config.training.precision
    is_single = precision is Precision.AUTO and config.gpus == 0 and not has_bfloat16()
    return 4 if is_single or precision is Precision.FP32 else 2


def _count(scan: Scan) -> RowCounts:
    return RowCounts(
        total=scan.rows,
        bad=scan.bad,
        duplicates=scan.duplicates.duplicates(),
        duplicates_complete=scan.duplicates.is_complete,
        oversized=scan.oversized,
        refused=scan.refused,
    )


def describe_scan(scan: Scan, config: RunConfig) -> TokenStatistics | None:
    """Statistics of the sample, with the longest row even if it is not in the sample; None without encoded rows."""
    limit = config.model.max_sequence_length
    rows = scan.measured.rows
    tokens = describe_tokens([row.length for row in rows], [row.supervised for row in rows], limit)
    return tokens.model_copy(update={"max": max(tokens.max, scan.max_length)}) if tokens else None


def _trained_lengths(scan: Scan, config: RunConfig) -> list[int]:
    """Tokens of the measured rows that train, after truncation."""
    return [min(row.length, config.model.max_sequence_length) for row in scan.measured.rows if row.supervised]


def _as_trained(config: RunConfig, model: Any) -> RunConfig:
    """The configuration by which rows are trained: without packing, if documents of the model cannot be packed."""
    if not pads_rows(config, model):
        return config
    return config.model_copy(update={"dataset": config.dataset.model_copy(update={"packing": False})})


def _training_size(scan: Scan, config: RunConfig) -> TrainingSize | None:
    """The size of the training; None if no row trains."""
    limit = config.model.max_sequence_length
    lengths = _trained_lengths(scan, config)
    if not lengths:
        return None

    # The sample's share of rows that train stands for that of all rows.
    usable = round((scan.rows - scan.bad) * len(lengths) / len(scan.measured.rows))
    longest = limit if scan.oversized else max(scan.max_length, *lengths)
    return training_size(lengths, usable, longest, config.dataset, config.training, limit)


def _plan(
    config: RunConfig, model: ModelFacts | None, size: TrainingSize, scan: Scan, evaluation: Scan | None
) -> PlannedTraining:
    """All that is known of the training, for those who judge it."""
    tokenizer = model.tokenizer if model else None
    template = str(tokenizer.chat_template) if tokenizer is not None else ""
    return PlannedTraining(
        config=config,
        size=size,
        layout=scan.layout,
        has_template=tokenizer is not None and tokenizer.chat_template is not None,
        base_model=model.base_model if model else None,
        trains_markers=any(text in template for text in config.model.new_tokens),
        overlap=_overlap(config, scan, evaluation),
    )


def _overlap(config: RunConfig, scan: Scan, evaluation: Scan | None) -> EvaluationOverlap | None:
    """Evaluation rows that also train; None without an evaluation."""
    if evaluation is not None:
        return EvaluationOverlap(evaluation.rows - evaluation.bad, evaluation.duplicates.count_in(scan.duplicates))

    fraction = config.dataset.evaluation.fraction if config.dataset.evaluation else None
    if fraction is None:
        return None

    # Of a row that occurs twice, both are held out with a chance of fraction squared; then neither trains.
    usable = scan.rows - scan.bad
    held_out = usable - training_rows(usable, config.dataset)
    return EvaluationOverlap(held_out, round(scan.duplicates.with_a_twin() * fraction * (1 - fraction)))


def scan_source(data: FetchedSource, spec: DatasetSpec, model: ModelFacts | None, config: RunConfig) -> Scan:
    """Scans the rows of a source as the job would train on them."""
    tokenizer = model.tokenizer if model else None
    rows = embedding_rows(model.configuration) if model else None
    limit, added = config.model.max_sequence_length, config.model.new_tokens
    return scan_rows(data.files, spec, tokenizer, limit, rows, added)
