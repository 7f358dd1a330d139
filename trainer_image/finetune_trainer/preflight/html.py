"""The report as one page: no scripts, nothing fetched, every text from outside escaped. Pure.

The page forbids scripts and requests itself as well (Content-Security-Policy), so that a hole in the escaping would
still run nothing.
"""

from collections.abc import Iterable
from html import escape

from finetune_trainer.preflight.histogram import draw_histogram
from finetune_trainer.preflight.report import Finding, GpuEstimate, Report, Sample
from finetune_trainer.preflight.table import SHOWN_FINDINGS, facts

STYLE = """
:root{--ink:#1c1e21;--dim:#5b616b;--line:#dfe3e8;--card:#f6f7f9;--bad:#a40e26;--fine:#176639;--warn:#7a4f00}
body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:var(--ink)}
h1{font-size:1.5rem;margin:0 0 .6rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}h3{font:600 .85rem ui-monospace,monospace}
.verdict{padding:.7rem 1rem;border-radius:8px;border-left:6px solid;background:var(--card)}
.verdict.bad{border-color:var(--bad)}.verdict.fine{border-color:var(--fine)}
table{border-collapse:collapse;width:100%}td,th{padding:.35rem 1rem .35rem 0;text-align:left;vertical-align:top}
summary{margin:.6rem 0;cursor:pointer}
tr{border-bottom:1px solid var(--line)}th{font-weight:500;color:var(--dim);width:14rem;white-space:nowrap}
td:first-child code{white-space:nowrap}td,pre{overflow-wrap:anywhere}code{font-size:.9em}
.error code{color:var(--bad)}.warning code{color:var(--warn)}.note{color:var(--dim);font-size:.9rem;margin:.3rem 0}
pre{white-space:pre-wrap;background:var(--card);padding:1rem;border-radius:8px;font-size:.85rem}
mark{background:#b6e3b8;color:inherit}svg{width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:#5b616b}
rect{fill:#3b6ea5}rect.cut{fill:#c9772f}line{stroke:#dfe3e8}line.limit{stroke:#c9772f;stroke-dasharray:4 3}
.bar{background:var(--line);border-radius:4px;height:.8rem;overflow:hidden}
.bar i{display:block;height:100%;background:#3b6ea5}.bar i.bad{background:var(--bad)}
""".strip()
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_html(report: Report) -> str:
    """The page."""
    title = escape(f"Preflight of {report.job}")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>",
        _verdict(report),
        _findings("error", "Errors", report.errors(), report.more_errors),
        _findings("warning", "Warnings", report.warnings()),
        f"<h2>Facts</h2>{_table(facts(report))}",
        draw_histogram(report.tokens, report.max_sequence_length) if report.tokens else "",
        _gpu(report.gpu) if report.gpu else "",
        _samples(report.samples),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _verdict(report: Report) -> str:
    count, warnings = report.error_count(), len(report.warnings())
    kind, text = ("bad", "The job cannot run as it is") if count else ("fine", "The job can run")
    return f'<p class="verdict {kind}"><b>{text}</b>: {_plural(count, "error")}, {_plural(warnings, "warning")}.</p>'


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def _findings(kind: str, heading: str, findings: Iterable[Finding], more: int = 0) -> str:
    rows = [
        f'<tr class="{kind}"><td><code>{escape(finding.location)}</code></td><td>{escape(finding.message)}</td></tr>'
        for finding in findings
    ]
    if not rows:
        return ""
    first, others = "".join(rows[:SHOWN_FINDINGS]), "".join(rows[SHOWN_FINDINGS:])
    folded = f"<details><summary>{len(rows) - SHOWN_FINDINGS} more</summary><table>{others}</table></details>"
    rest = f'<p class="note">And {_plural(more, "bad row")} that are only counted.</p>' if more else ""
    return f"<h2>{heading}</h2><table>{first}</table>{folded if others else ''}{rest}"


def _table(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs)
    return f"<table>{rows}</table>"


def _gpu(gpu: GpuEstimate) -> str:
    bar = ""
    if gpu.memory_bytes:
        share = gpu.peak_bytes / gpu.memory_bytes
        kind = ' class="bad"' if share > 1 else ""
        bar = f'<div class="bar"><i{kind} style="width:{min(1.0, share):.1%}"></i></div>'
        bar += f'<p class="note">{share:.0%} of the memory of {escape(gpu.name)}, at the peak of training.</p>'
    return f"<h2>GPU memory</h2>{bar}{_table((row.name, row.value) for row in gpu.plan)}"


def _samples(samples: Iterable[Sample]) -> str:
    blocks = []
    for sample in samples:
        spans = (f"<mark>{escape(span.text)}</mark>" if span.supervised else escape(span.text) for span in sample.spans)
        blocks.append(f"<h3>{escape(sample.location)}</h3><pre>{''.join(spans)}</pre>")
    note = '<p class="note"><mark>Green</mark> carries loss: this is what is learned.</p>'
    return f"<h2>Rows as the model reads them</h2>{note}{''.join(blocks)}" if blocks else ""
