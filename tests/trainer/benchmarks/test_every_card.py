"""The default plan on emulated cards: what is measured, what is said of it, and when the program fails."""

import csv
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from speed.cards.every_card import CARDS, TOKENS, Outcome, conduct, main, table

GOOD = Outcome("llama-8b", 8.0, 512, 7.0, 7.1, False, 0, 0, 0.0, 12_345.0)


def outcome(model: str, card_gib: float, tokens: int) -> Outcome:
    """A plan that held and took 90 % of its card."""
    return replace(GOOD, model=model, card_gib=card_gib, tokens=tokens, peak_gib=0.9 * card_gib)


def said(outcomes: list[Outcome]) -> str:
    """The table as it is printed."""
    console = Console(width=120, file=StringIO())
    console.print(table(outcomes))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_plan_is_good_if_it_held_and_left_nothing_unused() -> None:
    assert GOOD.is_good
    assert not replace(GOOD, fallbacks=1).is_good
    assert not replace(GOOD, peak_gib=6.3).is_good
    assert replace(GOOD, peak_gib=6.3, keeps_all=True).is_good
    assert not replace(GOOD, keeps_all=True, fallbacks=1).is_good


def test_the_table_says_what_is_wrong() -> None:
    text = said([GOOD, replace(GOOD, fallbacks=2), replace(GOOD, peak_gib=6.3), replace(GOOD, keeps_all=True)])
    lines = [line for line in text.splitlines() if "12,345" in line]
    assert "89%" in lines[0]
    assert all(words in line for words, line in zip(("ran out 2 times", "unused", "keeps all"), lines[1:], strict=True))
    assert "unused" not in lines[0]


def test_all_cards_are_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "cards.csv"
    assert main([f"--csv={target}", "--commit=abc"], outcome) == 0
    assert main([f"--csv={target}", "--commit=abd", "--cards=12", "--tokens=256,512"], outcome) == 0

    lines = list(csv.DictReader(StringIO(target.read_text(encoding="utf-8"))))
    expected = [(float(card), tokens) for card in CARDS for tokens in TOKENS] + [(12.0, 256), (12.0, 512)]
    assert [(float(line["card_gib"]), int(line["tokens"])) for line in lines] == expected
    assert [line["commit"] for line in lines].count("abd") == 2
    assert {line["gpu"] for line in lines} == {"CPU"}
    assert "80 GiB, 8,192 tokens: 72.00 GiB" in capsys.readouterr().out


def test_what_was_measured_is_kept_if_the_program_is_ended(tmp_path: Path) -> None:
    def measure(model: str, card_gib: float, tokens: int) -> Outcome:
        if card_gib == 16:
            raise KeyboardInterrupt
        return outcome(model, card_gib, tokens)

    target = tmp_path / "cards.csv"
    with pytest.raises(KeyboardInterrupt):
        main([f"--csv={target}", "--commit=abc", "--cards=8,12,16", "--tokens=512"], measure)
    lines = csv.DictReader(StringIO(target.read_text(encoding="utf-8")))
    assert [float(line["card_gib"]) for line in lines] == [8.0, 12.0]


@pytest.mark.parametrize("kind", ["ran out", "failed"])
def test_one_card_that_is_not_good_is_a_failure_and_the_others_are_measured(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(model: str, card_gib: float, tokens: int) -> Outcome:
        if (card_gib, tokens) == (12, 512):
            if kind == "failed":
                raise RuntimeError("CUDA out of memory\nmore words")
            return replace(outcome(model, card_gib, tokens), fallbacks=1)
        return outcome(model, card_gib, tokens)

    target = tmp_path / "cards.csv"
    assert main([f"--csv={target}", "--commit=abc", "--cards=8,12,16"], measure) == 1
    assert len(target.read_text(encoding="utf-8").splitlines()) == 1 + 9 - (kind == "failed")
    words = "not measured: 12 GiB, 512 tokens: CUDA out of memory" if kind == "failed" else "memory ran out 1 times"
    assert words in capsys.readouterr().out


def test_no_card_begins_that_would_end_too_late() -> None:
    pairs, times = [(8.0, 512), (12.0, 512), (16.0, 512)], iter([100.0, -1.0, -1.0])
    kept: list[Outcome] = []
    measure = partial(outcome, "llama-8b")
    found, missing = conduct(pairs, measure, kept.append, lambda: next(times), Console(file=StringIO()))
    assert [one.card_gib for one in found] == [8.0]
    assert kept == found
    assert missing == ["12 GiB, 512 tokens: no time left", "16 GiB, 512 tokens: no time left"]
