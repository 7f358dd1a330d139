"""Bars of speed and memory as SVG text, light or dark as the reader's system is. Pure and deterministic.

Each row of the benchmark has a panel: tokens per second to the left, peak memory to the right, both from zero. The
background is painted, so that the text can be read whatever page the picture stands on.
"""

from collections.abc import Mapping, Sequence
from html import escape

from speed.results import Summary

LABELS = {
    "ours": "this project",
    "ours-fp8": "this project, FP8",
    "ours-balanced": "this project, Balanced",
    "ours-smallest": "this project, Smallest",
    "unsloth-max": "Unsloth, KEEP_LAYERS=max",
    "unsloth": "Unsloth, default",
    "liger": "HF + TRL + Liger",
    "hf-no-checkpointing": "HF + TRL, no recomputing",
    "hf": "HF + TRL",
}
"""What systems are called, in the order in which they are shown."""
WIDTH, MARGIN, LINE, BAR, HEAD = 920, 24, 26, 16, 62
NAMES_END, SPEED_FROM, SPEED_TO, MEMORY_FROM, MEMORY_TO = 236, 248, 560, 650, 836
STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1f2328 }
  .page { fill: #ffffff; stroke: #d1d9e0 } .title { font-weight: 600; font-size: 15px } .small { fill: #59636e; font-size: 12px }
  .ours { fill: #0969da } .peer { fill: #9aa4af } .strong { font-weight: 600 } .axis { stroke: #d1d9e0 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .page { fill: #0d1117; stroke: #3d444d } .small { fill: #9198a1 }
    .ours { fill: #4493f8 } .peer { fill: #656c76 } .axis { stroke: #3d444d }
  }
"""  # noqa: E501


def draw(panels: Mapping[str, Sequence[Summary]], caption: str) -> str:
    """The picture: summaries by the panel's title, and a line below them."""
    parts: list[str] = []
    y = MARGIN
    for title, summaries in panels.items():
        parts += _panel(title, in_order(summaries), y)
        y += HEAD + LINE * len(summaries) + MARGIN
    parts.append(_text(MARGIN, y + 4, caption, "small"))
    height = y + MARGIN
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="Training speed and memory">',
            f"<style>{STYLE}</style>",
            f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
            *parts,
            "</svg>\n",
        ]
    )


def in_order(summaries: Sequence[Summary]) -> list[Summary]:
    """As they are shown: ours first, peers from fast to slow as a rule."""
    return sorted(summaries, key=lambda one: list(LABELS).index(one.system))


def _panel(title: str, summaries: Sequence[Summary], y: int) -> list[str]:
    fastest = max(one.tokens_per_second for one in summaries)
    largest = max(one.peak_gib for one in summaries)
    bottom = y + HEAD - 8 + LINE * len(summaries)
    parts = [
        _text(MARGIN, y + 16, title, "title"),
        _text(SPEED_FROM, y + 42, "tokens per second (more is better)", "small"),
        _text(MEMORY_FROM, y + 42, "peak GiB (less is better)", "small"),
    ]
    parts += [
        f'<line class="axis" x1="{at}" y1="{y + HEAD - 10}" x2="{at}" y2="{bottom}"/>'
        for at in (SPEED_FROM, MEMORY_FROM)
    ]
    for index, one in enumerate(summaries):
        top = y + HEAD - 5 + LINE * index
        kind = "ours" if one.system.startswith("ours") else "peer"
        strong = "strong" if kind == "ours" else ""
        parts.append(_text(NAMES_END, top + 13, LABELS[one.system], strong, end=True))
        speed = (SPEED_TO - SPEED_FROM) * one.tokens_per_second / fastest
        memory = (MEMORY_TO - MEMORY_FROM) * one.peak_gib / largest
        parts += _bar(SPEED_FROM, top, speed, kind, f"{one.tokens_per_second:,.0f}", strong)
        parts += _bar(MEMORY_FROM, top, memory, kind, f"{one.peak_gib:.1f}", strong)
    return parts


def _bar(x: int, y: int, length: float, kind: str, value: str, weight: str) -> list[str]:
    bar = f'<rect class="{kind}" x="{x}" y="{y}" width="{length:.1f}" height="{BAR}"/>'
    return [bar, _text(x + length + 6, y + 13, value, weight)]


def _text(x: float, y: int, words: str, kind: str, *, end: bool = False) -> str:
    place = ' text-anchor="end"' if end else ""
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y}"{name}{place}>{escape(words)}</text>'
