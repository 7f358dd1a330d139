"""Output of the benchmark on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from speed.results import PEERS, Result, ratio, summarise
from speed.rows import LONGEST


def progress_line(result: Result, seconds: float) -> str:
    """Returns one line about a finished measurement that took `seconds`."""
    longest = f", {result.max_tokens} tokens long" if result.max_tokens else ""
    return (
        f"    {result.tokens_per_second:.0f} tokens/s (spread {result.spread:.1%}), {result.peak_gib:.2f} GiB, "
        f"first step {result.first_step_s:.1f} s, gradient norm {result.grad_norm:.3f}{longest}; took {seconds:.0f} s"
    )


def show(
    console: Console, made: Sequence[Result], failed: Sequence[str], left_out: Sequence[str], seconds: float
) -> None:
    """Prints the table, then failed and skipped measurements."""
    if made:
        first = made[0]
        console.print(f"\nrun {first.run}, {first.gpu}, {first.commit}; {first.versions}", highlight=False)
        console.print(table(made))

    for result in made:
        if result.row in LONGEST and result.max_tokens:
            share = result.max_tokens / LONGEST[result.row]
            published = f"{share:.2f}x Unsloth's published {LONGEST[result.row]}"
            console.print(f"{result.row}: {result.max_tokens} tokens, {published}; the card is emulated")

    for word, names in (("failed", failed), ("left out for lack of time", left_out)):
        if names:
            console.print(f"{word}: {', '.join(names)}", highlight=False)
    console.print(f"{seconds:.0f} s in all", highlight=False)


def table(made: Sequence[Result]) -> Table:
    """Returns the table: for each row and system speed, ratio to the peers, memory and first step."""
    columns = ["row", "system", "tokens/s", "spread", "x unsloth-max", "x unsloth", "peak GiB", "planned", "longest",
               "first step s", "grad norm"]  # fmt: skip
    found = Table(*columns)

    for row in dict.fromkeys(result.row for result in made):
        summaries = summarise([result for result in made if result.row == row])
        for one in summaries:
            ratios = [ratio(summaries, one, peer) for peer in PEERS]

            found.add_row(
                row, one.system + (f" ({one.repeats})" if one.repeats > 1 else ""), f"{one.tokens_per_second:,.0f}",
                f"{one.spread:.1%}", *("" if value is None else f"{value:.2f}" for value in ratios),
                f"{one.peak_gib:.2f}", "" if one.planned_gib is None else f"{one.planned_gib:.2f}",
                f"{one.max_tokens:,}" if one.max_tokens else "", f"{one.first_step_s:.1f}", f"{one.grad_norm:.3f}",
            )  # fmt: skip
        found.add_section()

    return found
