"""Tables of the benchmark in Markdown: the fastest two for README.md, every figure for docs/benchmarks.md. Pure."""

from collections.abc import Sequence

from benchmarks import micro_results
from benchmarks.micro_results import Timing
from speed.charts import gpus
from speed.charts.labels import LABELS, MODELS, in_order, shown_runs, title
from speed.results import PEERS, Result, Summary, newest, ratio, summarise
from speed.rows import LONGEST, ROWS

BENCHMARKS_HEADER = (
    "<!-- GENERATED from trainer_image/benchmarks/speed/results.csv and kernels/benchmarks/micro.csv "
    "by `make generate`: do not edit. -->"
)
METHOD = (
    "Random NF4 weights, all tokens supervised, each system through TRL's trainer (with PEFT) in its own process;",
    "the median of the steps after warm-up, and the shortest first step where a system was measured twice.",
    "Absolute figures move between machines of one kind: compare within a run only. `make bench` measures again.",
)


def readme_section(results: Sequence[Result], calls: gpus.Calls = ()) -> str:
    """Returns what README.md shows: the chart, one row for each model and batch, several GPUs, and where the figures
    are from. `calls`: those of the benchmark of several GPUs."""
    shown = shown_runs(results)
    lines = [
        "![Training speed and peak memory of this project and its peers](docs/speed.svg)", "",
        "| | this project, tokens/s | Unsloth, tokens/s | ratio | this project, peak GiB | Unsloth, peak GiB |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip

    for row, of_run in shown.items():
        summaries = summarise(of_run)
        ours, unsloth = _find(summaries, "ours"), _fastest(summaries, PEERS)
        speeds = f"{ours.tokens_per_second:,.0f} | {unsloth.tokens_per_second:,.0f}"
        times = f"{ours.tokens_per_second / unsloth.tokens_per_second:.2f}x"
        lines.append(f"| {title(row)} | {speeds} | {times} | {ours.peak_gib:.2f} | {unsloth.peak_gib:.2f} |")

    lines += ["", _summary_of_provenance(shown)]
    if calls:
        lines += ["", *gpus.readme_table(calls, results), "", gpus.provenance(calls)]
    return "\n".join(lines) + "\n"


def benchmarks_page(results: Sequence[Result], timings: Sequence[Timing] = (), calls: gpus.Calls = ()) -> str:
    """Returns docs/benchmarks.md: all systems of the shown runs, longest sequence, several GPUs, single kernels, and
    provenance."""
    shown = shown_runs(results)
    lines = [
        BENCHMARKS_HEADER, "", "# Benchmarks", "",
        "![Training speed and peak memory of this project and its peers](speed.svg)", "",
        "## Training: speed and memory", "", *METHOD, "", *_systems_table(shown), "",
        *_other_runs(results, shown), *_provenance(shown), "", *_longest_sequences(results),
    ]  # fmt: skip

    if calls:
        lines += ["## Several GPUs", "", *gpus.readme_table(calls, results), ""]
        lines += [*gpus.profile_table(calls), "", gpus.provenance(calls), ""]
    if kernels := micro_results.section(timings):
        lines += ["## Single kernels", "", *kernels]
    return "\n".join(lines[:-1]) + "\n"


def _systems_table(shown: dict[str, list[Result]]) -> list[str]:
    lines = [
        "| | tokens/s | of Unsloth max | of Unsloth | peak GiB | first step, s |",
        "|---|---|---|---|---|---|",
    ]

    for row, of_run in shown.items():
        lines.append(f"| **{title(row)}** | | | | | |")
        summaries = summarise(of_run)
        for one in in_order(summaries):
            shares = [ratio(summaries, one, peer) for peer in PEERS]
            cells = [f"{one.tokens_per_second:,.0f}", *("" if share is None else f"{share:.2f}x" for share in shares)]
            lines.append(
                f"| {LABELS[one.system]} | {' | '.join(cells)} | {one.peak_gib:.2f} | {one.first_step_s:.1f} |"
            )
    return lines


def _other_runs(results: Sequence[Result], shown: dict[str, list[Result]]) -> list[str]:
    """Compares with the systems that a shown run lacks, by the newest run that measured them beside this project."""
    lines = []
    for row, of_run in shown.items():
        missing = [system for system in LABELS if system not in {one.system for one in of_run}]

        found = []
        for system in missing:
            beside = newest(results, {"ours", system}).get(row)
            if beside is not None:
                summaries = summarise(beside)
                share = ratio(summaries, _find(summaries, "ours"), system)
                found.append(f"{share:.2f}x the speed of {LABELS[system]} (run {beside[0].run})")

        if found:
            lines += [f"{title(row)}, in other runs: this project has {', '.join(found)}.", ""]
    return lines


def _longest_sequences(results: Sequence[Result]) -> list[str]:
    """Returns the section of smaller cards; nothing if none was searched."""
    known = newest(results, {"ours-smallest"})
    found = [(row, published, known[row]) for row, published in LONGEST.items() if row in known]
    if not found:
        return []

    gpu = found[0][2][0].gpu
    lines = [
        "## Longest sequences", "",
        f"With `memory: Smallest`, on cards emulated by one {gpu}; CUDA keeps half a GiB.", "",
        "| model | card | this project trains | peak GiB | host memory, GiB | Unsloth publishes | run, commit |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    return [*lines, *(_longest_line(*one) for one in found), ""]


def _longest_line(row: str, published: int, of_run: Sequence[Result]) -> str:
    (summary,), first = summarise(of_run), of_run[0]
    assert summary.max_tokens is not None
    host = "" if first.host_gib is None else f"{first.host_gib:.1f}"
    peers = f"{published:,} ({summary.max_tokens / published:.1f}x)"
    card = f"{MODELS[ROWS[row].model]} | {ROWS[row].card_gib:.0f} GB"
    return (
        f"| {card} | {summary.max_tokens:,} tokens | {summary.peak_gib:.2f} | {host} | {peers} "
        f"| {first.run}, {first.commit} |"
    )


def _provenance(shown: dict[str, list[Result]]) -> list[str]:
    """Returns run, GPU, commit and versions of each shown row."""
    lines = []
    for row, of_run in shown.items():
        first = of_run[0]
        lines.append(f"* {title(row)}: run {first.run} on one {first.gpu}, commit {first.commit}; {first.versions}.")
    return lines


def _summary_of_provenance(shown: dict[str, list[Result]]) -> str:
    firsts = [of_run[0] for of_run in shown.values()]
    runs = _named("run", [str(run) for run in sorted({first.run for first in firsts})])
    cards = ", ".join(sorted({first.gpu for first in firsts}))
    commits = _named("commit", sorted({first.commit for first in firsts}))
    return (
        f"Unsloth with its fastest setting; both measured in turn on one {cards} ({runs}, {commits}). "
        "All systems, versions and single kernels: [docs/benchmarks.md](docs/benchmarks.md)."
    )


def _named(noun: str, names: Sequence[str]) -> str:
    """The noun and its names, as one says them: run 1; runs 1 and 2; runs 1, 2 and 3."""
    if len(names) == 1:
        return f"{noun} {names[0]}"
    return f"{noun}s {', '.join(names[:-1])} and {names[-1]}"


def _find(summaries: Sequence[Summary], system: str) -> Summary:
    return next(one for one in summaries if one.system == system)


def _fastest(summaries: Sequence[Summary], systems: Sequence[str]) -> Summary:
    return max((one for one in summaries if one.system in systems), key=lambda one: one.tokens_per_second)
