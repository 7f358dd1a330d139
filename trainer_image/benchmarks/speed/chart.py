"""Writes every generated figure of the documents: `python -m speed.chart [--check]`.

Made from results.csv, several_gpus.csv and micro.csv: docs/speed.svg, docs/benchmarks.md and the marked section of
README.md. With --check nothing is written; stale files are named and the exit status is 1.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import micro_results
from benchmarks.micro_results import Timing
from speed.charts.bars import draw
from speed.charts.gpus import Calls
from speed.charts.labels import shown_runs, title
from speed.charts.tables import benchmarks_page, readme_section
from speed.results import Result, read, summarise
from speed.several import results as several_results

CHECKOUT = Path(__file__).resolve().parents[3]
PICTURE = CHECKOUT / "docs/speed.svg"
BENCHMARKS = CHECKOUT / "docs/benchmarks.md"
README = CHECKOUT / "README.md"
BEGIN = "<!-- GENERATED from trainer_image/benchmarks/speed/results.csv by `make generate`: begin -->\n"
END = "<!-- GENERATED: end -->\n"


def main(arguments: Sequence[str]) -> int:
    """Writes or checks the files; returns the exit status."""
    readme = README.read_text(encoding="utf-8")
    wanted = generated_files(read(), micro_results.read(), several_results.read(), readme)
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]

    if "--check" in arguments:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(CHECKOUT)} is stale: run `make generate`\n")
        return 1 if stale else 0

    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
        sys.stdout.write(f"wrote {path.relative_to(CHECKOUT)}\n")
    return 0


def generated_files(
    results: Sequence[Result], timings: Sequence[Timing], calls: Calls, readme: str
) -> dict[Path, str]:  # fmt: skip
    """Content of each generated file."""
    return {
        PICTURE: picture(results),
        BENCHMARKS: benchmarks_page(results, timings, calls),
        README: replace_section(readme, readme_section(results, calls)),
    }


def picture(results: Sequence[Result]) -> str:
    """Returns the SVG file."""
    shown = shown_runs(results)
    panels = {title(row): summarise(of_run) for row, of_run in shown.items()}
    gpus = ", ".join(sorted({one.gpu for of_run in shown.values() for one in of_run}))
    caption = f"{gpus}; QLoRA, rank 16 on all linears, AdamW 8-bit, bfloat16; systems measured in turn"
    return draw(panels, f"{caption}. (1.22x): speed over Unsloth with KEEP_LAYERS=max.")


def replace_section(readme: str, text: str) -> str:
    """`readme` with `text` between the marks. Raises ValueError where they are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)

    if not begin or not end:
        raise ValueError(f"README.md has no generated section: put {BEGIN.strip()} and {END.strip()} around it")
    return before + BEGIN + text + END + after


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
