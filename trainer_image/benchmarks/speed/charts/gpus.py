"""The table of several GPUs in Markdown: a short one for README.md, with the profile of a step for docs/benchmarks.md.
Pure."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from speed.charts.labels import LABELS
from speed.results import Result
from speed.several.results import Measured, newest_of

GPUS = (2, 4)
PEERS = ("unsloth-max", "hf")
WORDS = {1: "one", 2: "two", 4: "four"}
Calls = Sequence[Sequence[Measured]]


class Line(NamedTuple):
    """A line of the table."""

    title: str
    measured: Measured
    share: str
    """How it compares, in words."""


def readme_table(calls: Calls, results: Sequence[Result]) -> list[str]:
    """Returns the lines of README's table."""
    lines = ["| | tokens/s | | peak GiB a card |", "|---|---|---|---|"]
    for one in _lines(calls):
        found = one.measured
        lines.append(f"| {one.title} | {found.tokens_per_second:,.0f} | {one.share} | {found.peak_gib:.2f} |")
    for peer, of_gpus, times in _peers(calls, results):
        title = f"{LABELS[peer.system]}, {WORDS[of_gpus]} GPUs"
        lines.append(f"| {title} | {peer.tokens_per_second:,.0f} | {times} | {peer.peak_gib:.2f} |")
    return lines


def profile_table(calls: Calls) -> list[str]:
    """Returns the lines of the table of steps: where their time goes beside computing."""
    lines = [
        "| | step, ms | all-reduce, ms | waiting for the slowest, ms | gathers, ms (not hidden) | GiB planned |",
        "|---|---|---|---|---|---|",
    ]
    for title, found, _ in _lines(calls):
        if found.all_reduce_ms is not None:
            gathers = f"{found.gathers_ms:,.0f} ({found.exposed_gathers_ms:.1f})" if found.gathers_ms else ""
            each = f"{found.step_ms:,.0f} | {found.all_reduce_ms:.2f} | {found.waiting_ms:.1f} | {gathers}"
            lines.append(f"| {title} | {each} | {found.planned_gib:.2f} |")
    return lines


def provenance(calls: Calls) -> str:
    """Returns where the figures are from."""
    measured = [line.measured for line in _lines(calls)]
    gpus, commits = sorted({one.gpu for one in measured}), sorted({one.commit for one in measured})
    return (
        f"Llama 8B, 2 x 2,048 tokens a pass and 4 passes a step on each {' or '.join(gpus)} of one host; each line "
        f"beside one GPU of the same machine (commits {' and '.join(commits)}). Networks of 10 Gbit/s are played: each "
        "sum takes as long as it would between nodes."
    )


def _lines(calls: Calls) -> Iterator[Line]:
    """All lines of this project."""
    newest = [found for gpus in reversed(GPUS) if (found := newest_of(calls, "replicated", gpus))]
    if newest:
        yield Line("one GPU", newest[0][1], "")
    for gpus in GPUS:
        for row, title in _titles(gpus).items():
            found = newest_of(calls, row, gpus)
            if found is not None:
                line, one = found
                yield Line(title.format(card=line.card_gib or 0), line, _share(line, one))


def _titles(gpus: int) -> dict[str, str]:
    number = WORDS[gpus]
    return {
        "replicated": f"{number} GPUs",
        "sharded": f"{number} GPUs, weights shared out",
        "slow-network": f"{number} nodes at 10 Gbit/s",
        "large-sharded": f"Llama 70B, shared out over {number} cards of {{card:.0f}} GiB",
    }


def _share(line: Measured, one: Measured) -> str:
    """The speed as a multiple of one GPU's with the same model."""
    if line.row.startswith("large"):
        return f"{line.tokens_per_second / line.gpus:,.0f} a GPU"
    return f"{line.tokens_per_second / one.tokens_per_second:.2f}x"


def _peers(calls: Calls, results: Sequence[Result]) -> Iterator[tuple[Result, int, str]]:
    """The newest line of each peer on several GPUs, and how this project compares on the same machine."""
    for gpus in GPUS:
        for system in PEERS:
            row = f"8b-2048-bs2-ga4-gpus{gpus}"
            found = [one for one in results if (one.row, one.system) == (row, system)]
            beside = [line for call in calls for line in call if _is_beside(line, gpus, found)]
            if beside:
                share = beside[-1].tokens_per_second / found[-1].tokens_per_second
                yield found[-1], gpus, f"this project is {share:.2f}x"


def _is_beside(line: Measured, gpus: int, found: Sequence[Result]) -> bool:
    """True for this project's line of the call in which the peer's newest line was measured."""
    return bool(found) and (line.row, line.gpus, line.commit) == ("replicated", gpus, found[-1].commit)
