"""Tables and chart of README.md, from results.csv and micro.csv: `python -m speed.chart [--check]`.

Shown is, by row, the newest run that holds this project and both modes of Unsloth. With --check nothing is written;
stale files are named and the exit status is 1.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import micro_results
from benchmarks.micro_results import Timing
from speed.results import COMPLETE, Result, newest, ratio, read, summarise
from speed.rows import LONGEST, ROWS, UNSLOTH_24G_TOKENS
from speed.speed_chart import LABELS, draw, in_order

CHECKOUT = Path(__file__).resolve().parents[3]
PICTURE = CHECKOUT / "docs/speed.svg"
README = CHECKOUT / "README.md"
BEGIN = "<!-- GENERATED from trainer_image/benchmarks/speed/results.csv by `make generate`: begin -->\n"
END = "<!-- GENERATED: end -->\n"
MODELS = {"llama-8b": "Llama 8B", "llama-1b": "Llama 1B", "qwen3-8b": "Qwen3 8B"}


def main(arguments: Sequence[str]) -> int:
    """Write or check; returns the exit status."""
    wanted = generated_files(read(), micro_results.read(), README.read_text(encoding="utf-8"))
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(CHECKOUT)} is stale: run `make generate`\n")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
        sys.stdout.write(f"wrote {path.relative_to(CHECKOUT)}\n")
    return 0


def generated_files(results: Sequence[Result], timings: Sequence[Timing], readme: str) -> dict[Path, str]:
    """Both files with their content."""
    return {PICTURE: picture(results), README: replace_section(readme, section(results, timings))}


def picture(results: Sequence[Result]) -> str:
    """The SVG file."""
    shown = _shown(results)
    panels = {title(row): summarise(of_run) for row, of_run in shown.items()}
    gpus = ", ".join(sorted({one.gpu for of_run in shown.values() for one in of_run}))
    return draw(panels, f"{gpus}; QLoRA, rank 16 on all linears, AdamW 8-bit, bfloat16; systems measured in turn")


def section(results: Sequence[Result], timings: Sequence[Timing] = ()) -> str:
    """The part of README.md between the marks."""
    lines = [
        "![Training speed and memory beside the peers](docs/speed.svg)", "",
        "| | tokens/s | of Unsloth max | of Unsloth | peak GiB | first step, s |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    shown = _shown(results)
    for row, of_run in shown.items():
        lines.append(f"| **{title(row)}** | | | | | |")
        summaries = summarise(of_run)
        for one in in_order(summaries):
            shares = [ratio(summaries, one, peer) for peer in ("unsloth-max", "unsloth")]
            cells = [f"{one.tokens_per_second:,.0f}", *("" if share is None else f"{share:.2f}x" for share in shares)]
            lines.append(
                f"| {LABELS[one.system]} | {' | '.join(cells)} | {one.peak_gib:.2f} | {one.first_step_s:.1f} |"
            )
    lines += ["", *_beside(results, shown), *_longest(results), *_provenance(shown)]
    if kernels := micro_results.section(timings):
        lines += ["", *kernels[:-1]]
    return "\n".join(lines) + "\n"


def title(row: str) -> str:
    """A row in words."""
    shape = ROWS[row]
    return f"{MODELS[shape.model]}, {shape.length:,} tokens, batch {shape.batch} x {shape.accumulation}"


def replace_section(readme: str, text: str) -> str:
    """`readme` with `text` between the marks. Raises ValueError where they are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("README.md lacks the marks of the generated section")
    return before + BEGIN + text + END + after


def _shown(results: Sequence[Result]) -> dict[str, list[Result]]:
    return {row: of_run for row, of_run in newest(results, COMPLETE).items() if row != LONGEST}


def _beside(results: Sequence[Result], shown: dict[str, list[Result]]) -> list[str]:
    """Systems that a shown run lacks, by what was measured beside this project in the newest run that has them."""
    lines = []
    for row, of_run in shown.items():
        missing = [system for system in LABELS if system not in {one.system for one in of_run}]
        found = []
        for system in missing:
            beside = newest(results, {"ours", system}).get(row)
            if beside is not None:
                summaries = summarise(beside)
                (ours,) = (one for one in summaries if one.system == "ours")
                found.append(
                    f"{ratio(summaries, ours, system):.2f}x the speed of {LABELS[system]} (run {beside[0].run})"
                )
        if found:
            lines += [f"{title(row)}, in other runs: this project has {', '.join(found)}.", ""]
    return lines


def _longest(results: Sequence[Result]) -> list[str]:
    found = newest(results, {"ours-smallest"}).get(LONGEST)
    if found is None:
        return []
    (summary,), first = summarise(found), found[0]
    card = f"a 24 GB card, emulated on one {first.gpu} (run {first.run}, commit {first.commit})"
    reached = f"{summary.max_tokens:,} tokens in {summary.peak_gib:.2f} GiB with `memory: Smallest`"
    published = f"Unsloth publishes {UNSLOTH_24G_TOKENS:,}."
    return [f"Longest sequence for {MODELS['llama-8b']} on {card}: {reached}; {published}", ""]


def _provenance(shown: dict[str, list[Result]]) -> list[str]:
    """Where the figures are from."""
    lines = [
        "Random NF4 weights, all tokens supervised, each system through TRL's trainer (with PEFT) in its own process;",
        "the median of the steps after warm-up, and the shortest first step where a system was measured twice.",
        "Absolute figures move between machines of one kind: compare within a run only. `make bench` measures again.",
        "",
    ]
    for row, of_run in shown.items():
        first = of_run[0]
        lines.append(f"* {title(row)}: run {first.run} on one {first.gpu}, commit {first.commit}; {first.versions}.")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
