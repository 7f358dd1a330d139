"""Draws docs/scale.svg from docs/scale.csv: what a number of jobs costs, beside what was promised."""

import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "scale", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}

import matplotlib.pyplot as plt  # noqa: E402 (the backend is chosen first)

DOCS = Path(__file__).resolve().parents[3] / "docs"
PANELS = {
    "Pod to status, one job a second, s": (
        ("calm_pod_runs_to_status_s", "calm_pod_ends_to_status_s"),
        ("_p50", "_p99"),
        5.0,
    ),
    "Pod to status in a rush, s": (("pod_runs_to_status_s", "pod_ends_to_status_s"), ("_p50", "_p99"), 5.0),
    "Memory of the operator, MiB": (("max_rss_mib", "restart_rss_mib"), ("",), 512.0),
    "Writes per job, without progress": (("writes_per_job_without_progress",), ("",), 15.0),
    "Reads a second while nothing changes": (("idle_reads_per_s",), ("",), 5.0),
}
"""By title: columns of the table, their suffixes, and the promised limit."""

COLORS = ("#4269d0", "#9db3ea", "#3ca951", "#a3d9ad")


def main() -> None:
    """Write the picture."""
    rows = list(csv.DictReader((DOCS / "scale.csv").open(encoding="utf-8")))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 2.8), layout="constrained")
    for axis, (title, (names, suffixes, limit)) in zip(axes, PANELS.items(), strict=True):
        _draw(axis, rows, [name + suffix for name in names for suffix in suffixes], limit)
        axis.set_title(title, fontsize=9)

    figure.savefig(DOCS / "scale.svg", metadata={"Date": None})


def _draw(axis: Any, rows: list[dict[str, str]], columns: list[str], limit: float) -> None:
    """Draw bars by number of jobs, where a run has the columns, and a line at the limit."""
    rows = [row for row in rows if row[columns[0]]]
    width = 0.8 / len(columns)
    for number, column in enumerate(columns):
        places = [place + number * width for place in range(len(rows))]
        bars = axis.bar(places, [float(row[column]) for row in rows], width, color=COLORS[number], label=_words(column))
        axis.bar_label(bars, fmt="%.3g", fontsize=7)

    axis.axhline(limit, color="#d62728", linewidth=1, linestyle="--", label=f"promised: below {limit:g}")
    centre = (len(columns) - 1) * width / 2
    labels = [f"{int(row['jobs']):,}\n{float(row['jobs_per_s']):g}/s" for row in rows]
    axis.set_xticks([place + centre for place in range(len(rows))], labels, fontsize=7)
    axis.set_xlabel("jobs, and new ones a second", fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=6, frameon=False)


def _words(column: str) -> str:
    return column.removeprefix("calm_").removesuffix("_mib").replace("_s_p", ", p").replace("_", " ")


if __name__ == "__main__":
    main()
