"""Draws the chart's dashboard from a Prometheus server: each panel's own queries, in the dashboard's own layout.

    python -P -m finetune_scale.dashboard http://127.0.0.1:9090 docs/dashboard.png --minutes 15

It shows what the panels show; Grafana itself draws them nicer.
"""

import argparse
import json
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DASHBOARD = Path(__file__).resolve().parents[3] / "charts/finetune-operator/files/dashboard.json"
COLUMNS, ROW_INCHES = 24, 0.36
LEGEND = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    options = parser.parse_args()

    panels = json.loads(DASHBOARD.read_text())["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(15, rows * ROW_INCHES), facecolor="#f4f5f5")
    for panel in panels:
        place = panel["gridPos"]
        left, width = place["x"] / COLUMNS, place["w"] / COLUMNS
        height = place["h"] / rows
        bottom = 1 - place["y"] / rows - height
        axes = figure.add_axes((left + 0.03, bottom + 0.028, width - 0.04, height - 0.05))
        _draw(axes, panel, options.prometheus, options.minutes)

    figure.savefig(options.picture, dpi=110)


def _draw(axes: Axes, panel: dict[str, Any], prometheus: str, minutes: float) -> None:
    axes.set_title(panel["title"], loc="left", fontsize=9, weight="bold")
    series = [line for target in panel["targets"] for line in _ask(prometheus, target, minutes)]
    if panel["type"] == "stat":
        axes.axis("off")
        newest = series[0][1][-1][1] if series else float("nan")
        axes.text(0.02, 0.15, f"{newest:,.6g}", fontsize=24, color="#3871dc")
        return

    for name, points in series[:12]:
        axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1.1, label=name)
    axes.set_xlim(-minutes, 0)
    axes.set_ylim(0, 1.2 * max((y for _, points in series for _, y in points), default=0.0) or 1.0)
    axes.tick_params(labelsize=6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if series:
        axes.legend(fontsize=5.5, frameon=False, ncols=3, loc="upper left")


def _ask(prometheus: str, target: dict[str, str], minutes: float) -> list[tuple[str, list[tuple[float, float]]]]:
    """Return name and points (minutes before now, value) of each series of a query."""
    now = time.time()
    query = {"query": target["expr"], "start": now - minutes * 60, "end": now, "step": max(1.0, minutes * 60 / 300)}
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(query)}") as answer:
        found = json.load(answer)["data"]["result"]
    return [
        (
            _name(target["legendFormat"], one["metric"]),
            [((float(x) - now) / 60, float(y)) for x, y in one["values"]],
        )
        for one in found
    ]


def _name(legend: str, labels: dict[str, str]) -> str:
    return LEGEND.sub(lambda label: labels.get(label[1], ""), legend)


if __name__ == "__main__":
    main()
