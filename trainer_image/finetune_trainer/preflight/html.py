"""The report as one page: no scripts, nothing fetched, every text from outside escaped. Pure.

The page forbids scripts and requests itself as well (Content-Security-Policy), so that a hole in the escaping would
still run nothing.
"""

from collections.abc import Iterable
from html import escape

from finetune_trainer.preflight.report import Finding, Report, Sample, TokenStatistics
from finetune_trainer.preflight.table import facts

WIDTH, HEIGHT, MARGIN = 720, 180, 28  # of the histogram, in px
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c1e21}
table{border-collapse:collapse}td,th{padding:.2rem 1rem .2rem 0;text-align:left;vertical-align:top}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f4f5f7;padding:1rem;border-radius:6px}
mark{background:#b6e3b8;color:inherit}.error{color:#a40e26}.warning{color:#7a4f00}
rect{fill:#3b6ea5}rect.cut{fill:#c9772f}svg{max-width:100%}text{font:11px system-ui,sans-serif}
""".strip()
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_html(report: Report) -> str:
    """The page."""
    title = escape(f"Preflight of {report.job}")
    verdict = "cannot run as it is" if report.errors() else "can run"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>",
        f"<p>The job {verdict}: {report.error_count():,} errors, {len(report.warnings())} warnings.</p>",
        _findings("error", "Errors", report.errors()),
        _findings("warning", "Warnings", report.warnings()),
        _facts(report),
        _histogram(report.tokens, report.max_sequence_length) if report.tokens else "",
        _samples(report.samples),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _findings(kind: str, heading: str, findings: Iterable[Finding]) -> str:
    rows = "".join(
        f'<tr class="{kind}"><td><code>{escape(finding.place)}</code></td><td>{escape(finding.message)}</td></tr>'
        for finding in findings
    )
    return f"<h2>{heading}</h2><table>{rows}</table>" if rows else ""


def _facts(report: Report) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts(report))
    return f"<h2>Facts</h2><table>{rows}</table>"


def _histogram(tokens: TokenStatistics, limit: int) -> str:
    most = max(entry.rows for entry in tokens.histogram)
    step = WIDTH / len(tokens.histogram)
    bars = []
    for index, entry in enumerate(tokens.histogram):
        height = (HEIGHT - 2 * MARGIN) * entry.rows / most
        kind = ' class="cut"' if entry.last > limit else ""
        bars.append(
            f'<rect{kind} x="{index * step:.1f}" y="{HEIGHT - MARGIN - height:.1f}" width="{step - 1:.1f}" '
            f'height="{height:.1f}"><title>{entry.first} to {entry.last} tokens: {entry.rows} rows</title></rect>'
        )
    base = HEIGHT - MARGIN / 2
    first, last = tokens.histogram[0].first, tokens.histogram[-1].last
    axis = f'<text x="0" y="{base}">{first} tokens</text><text x="{WIDTH}" y="{base}" text-anchor="end">{last}</text>'
    top = f'<text x="0" y="{MARGIN / 2}">{most} rows</text>'
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{"".join(bars)}{axis}{top}</svg>'
    note = "<p>Orange: rows of more tokens than maxSequenceLength. The last bar takes all that is longer.</p>"
    return f"<h2>Tokens per row</h2>{picture}{note}"


def _samples(samples: Iterable[Sample]) -> str:
    blocks = []
    for sample in samples:
        spans = (f"<mark>{escape(span.text)}</mark>" if span.supervised else escape(span.text) for span in sample.spans)
        blocks.append(f"<h3>{escape(sample.place)}</h3><pre>{''.join(spans)}</pre>")
    return f"<h2>Rows as the model reads them</h2><p>Green carries loss.</p>{''.join(blocks)}" if blocks else ""
