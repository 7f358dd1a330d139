"""The report for a terminal, and in one paragraph for the termination message. Pure."""

from rich.table import Table
from rich.text import Text

from finetune_api.vocabulary import MemoryMode
from finetune_trainer.data.report_limits import MAX_MESSAGE_FINDINGS, MAX_TABLE_FINDINGS
from finetune_trainer.preflight.report import GpuEstimate, Report, WeightCoverage
from finetune_trainer.storage.sizes import GIBIBYTE, format_size


def facts(report: Report) -> list[tuple[str, str]]:
    """Names and values, for people."""
    revision = f" at {report.model_revision}" if report.model_revision else ""
    found = [("model", f"{report.model_source}{revision}"), ("architecture", report.architecture or "unknown")]
    if report.published_weights is not None:
        found.append(("weights", report.published_weights))
    if report.new_tokens is not None:
        found.append(("new tokens", report.new_tokens))

    layout = report.dataset_detection or report.dataset_format
    found.append(("data", report.dataset_source + (f" ({layout})" if layout else "")))
    if (rows := report.rows) is not None:
        at_least = "" if rows.duplicates_complete else "at least "
        repeated = f"{at_least}{rows.duplicates:,} {'repeats' if rows.duplicates == 1 else 'repeat'} an earlier one"
        found.append(("rows", f"{rows.total:,}, {rows.bad:,} bad, {repeated}"))

    if (tokens := report.tokens) is not None:
        basis = "every row" if report.tokens_complete else f"a sample of {tokens.rows:,} rows"
        found += [
            ("tokens per row", f"p50 {tokens.p50:,}, p95 {tokens.p95:,}, max {tokens.max:,} ({basis})"),
            ("truncated", f"{tokens.truncated_share:.1%} of rows at {report.max_sequence_length:,} tokens"),
            ("supervised", f"{tokens.supervised_share:.1%} of tokens"),
        ]
    if report.optimizer_steps is not None:
        about = "" if report.tokens_complete else "about "
        unit = "epoch" if report.epochs == 1 else "epochs"
        epochs = f" ({report.epochs:.3g} {unit})" if report.epochs is not None else ""
        found.append(("optimizer steps", f"{about}{report.optimizer_steps:,}{epochs}"))
    if report.training_tokens is not None:
        found.append(("tokens in all steps", f"about {report.training_tokens:,}"))

    if report.coverage is not None:
        found += _coverage_facts(report.coverage)
    if report.cpu_advice is not None:
        found.append(("faster", report.cpu_advice))
    return found + (_gpu_facts(report.gpu) if report.gpu else [])


def _coverage_facts(coverage: WeightCoverage) -> list[tuple[str, str]]:
    lacking = f"; the model has no {', '.join(coverage.missing_targets)}" if coverage.missing_targets else ""
    if coverage.own_targets:
        lacking = f": {', '.join(coverage.own_targets)}, all linear layers, as it has not the default's names"
    experts = f"; {format_size(coverage.stacked_bytes)} of experts stay in 16 bits" if coverage.stacked_bytes else ""
    return [
        ("with an adapter", f"{coverage.adapted_share:.1%} of the layers' weights{lacking}"),
        *([("experts", f"{coverage.expert_share:.1%} of the layers' weights")] if coverage.expert_share else []),
        ("in NF4", f"{coverage.quantized_share:.1%} of the layers' weights{experts}"),
        ("weights in memory", format_size(coverage.loaded_bytes)),
    ]


def _gpu_facts(gpu: GpuEstimate) -> list[tuple[str, str]]:
    has = f" of {gpu.memory_bytes / GIBIBYTE:.1f} GiB" if gpu.memory_bytes else ""
    need = f"{gpu.peak_bytes / GIBIBYTE:.1f}{has or ' GiB'} with memory: {gpu.mode}"
    if gpu.mode is not MemoryMode.SMALLEST:
        need += f" ({gpu.smallest_bytes / GIBIBYTE:.1f} GiB with Smallest)"

    name, each = (gpu.name, "") if gpu.gpus == 1 else (f"{gpu.gpus} x {gpu.name}", " of each")
    return [("GPU", name), (f"GPU memory{each}", need), *_usage_facts(gpu)]


def _usage_facts(gpu: GpuEstimate) -> list[tuple[str, str]]:
    """GPU time, cost and energy; what is not known says why."""
    if gpu.hours is None or gpu.tokens_per_second is None:
        why = gpu.why_no_speed or "the number of steps is not known"
        return [
            ("GPU time", f"unknown, as {why}"),
            ("cost", "unknown without the GPU time"),
            ("energy", "unknown without the GPU time"),
        ]

    price, watts, gpu_hours = gpu.price, gpu.watts, gpu.hours * gpu.gpus
    cost = "unknown, as there is no price for this GPU (pricing.gpus in the values of the operator's chart)"
    if price is not None:
        cost = f"about {gpu_hours * price.per_hour:,.2f} {price.currency} at {price.per_hour:,.2f} an hour"
    energy = "unknown, as the power of this GPU is"
    if watts is not None:
        energy = f"at most about {_energy(gpu_hours * watts)}, at the card's limit of {watts} W"

    together = f" on {gpu.gpus} GPUs" if gpu.gpus > 1 else ""
    time = f"about {_duration(gpu.hours)}{together} at {gpu.tokens_per_second:,.0f} tokens/s"
    return [("GPU time", time), ("cost", cost), ("energy", energy)]


def _energy(watt_hours: float) -> str:
    return f"{watt_hours:,.0f} Wh" if watt_hours < 1000 else f"{watt_hours / 1000:,.2f} kWh"


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return "a minute"
    return f"{hours * 60:.0f} minutes" if hours < 2 else f"{hours:.1f} hours"


def to_table(report: Report) -> Table:
    """Findings, then facts. Texts from outside are never read as rich's markup."""
    table = Table(show_header=False, title=Text(f"preflight of {report.job}"))
    table.add_column(no_wrap=True, overflow="fold")
    table.add_column(overflow="fold")

    # Errors include bad rows that are only counted.
    counts = (report.error_count(), len(report.warnings()))
    for style, count, findings in zip(("red", "yellow"), counts, (report.errors(), report.warnings()), strict=True):
        for finding in findings[:MAX_TABLE_FINDINGS]:
            table.add_row(Text(finding.location, style=style), Text(finding.message))
        if count > MAX_TABLE_FINDINGS:
            table.add_row("", Text(f"and {count - MAX_TABLE_FINDINGS:,} more: see the report"))

    for name, value in facts(report):
        table.add_row(Text(name), Text(value))
    return table


def to_sentence(report: Report) -> str:
    """The termination message: errors with their locations, or the facts.

    A message that is too long is cut at its end, so the important comes first.
    """
    if errors := report.errors():
        named = [f"{finding.location}: {finding.message}" for finding in errors[:MAX_MESSAGE_FINDINGS]]
        count = f"{report.error_count()} errors: " if len(errors) > 1 else ""
        more = f" (and {report.error_count() - len(named)} more)" if len(errors) > len(named) else ""
        return count + "; ".join(named) + more

    warnings = [f"{finding.location}: {finding.message}" for finding in report.warnings()[:MAX_MESSAGE_FINDINGS]]
    return "; ".join([*(f"{name}: {value}" for name, value in facts(report)), *warnings])
