"""Renders the report as one self-contained page, from the template beside it. Pure but for reading the template."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune_trainer.data.report_limits import MAX_TABLE_FINDINGS
from finetune_trainer.preflight.histogram import lay_out_histogram
from finetune_trainer.preflight.report import Report
from finetune_trainer.preflight.table import facts

TEMPLATE = "report.html.jinja"


def render_html(report: Report) -> str:
    """The page. Texts from outside stay text: the template escapes every value."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "plural": _plural,
        "px": lambda length: f"{length:.1f}",
        "thousands": lambda count: f"{count:,}",
        "percent": lambda share, digits: f"{share:.{digits}%}",
    }

    tokens = report.tokens
    return environment.get_template(TEMPLATE).render(
        report=report,
        facts=facts(report),
        histogram=lay_out_histogram(tokens, report.max_sequence_length) if tokens else None,
        plan=[(row.name, row.value) for row in report.gpu.plan] if report.gpu else [],
        max_findings=MAX_TABLE_FINDINGS,
    )


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")
