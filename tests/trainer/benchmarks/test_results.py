"""The results' file, which run is shown, the order of measurements, the search's next length, and what is generated."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from speed import chart
from speed.cards.longest import GRAIN, Attempt, affordable, next_length
from speed.charts.bars import WIDTH
from speed.charts.labels import LABELS
from speed.charts.tables import BENCHMARKS_HEADER, benchmarks_page, readme_section
from speed.results import COMPLETE, RESULTS, Result, append, newest, next_run, parse, ratio, read, summarise, write
from speed.rows import ON_ONE_GPU, ROWS, SYSTEMS
from speed.schedule import Entry, expected_seconds, order

ROW, OTHER, TWO_GPUS = "8b-2048-bs2-ga4", "8b-8192-bs1-ga2", "8b-2048-bs2-ga4-gpus2"
GIB = 2**30
LONGEST_24 = "8b-longest-24g"


def result(run: int, system: str, rate: float = 1000.0, row: str = ROW, **changes: object) -> Result:
    made = Result(run, row, system, rate, 0.01, 6.5, None, None, 2.0, 0.3, "GPU", "torch 2", "abc")
    return replace(made, **changes)  # type: ignore[arg-type]


COMPLETE_RUN = [result(3, "ours", 1500), result(3, "unsloth-max", 1200), result(3, "unsloth", 800)]


def test_what_is_written_is_read_and_a_column_that_an_old_file_lacks_is_empty() -> None:
    results = [result(1, "ours", planned_gib=7.25), result(2, LONGEST_24, max_tokens=81_920, host_gib=9.5)]
    assert parse(write(results)) == results
    old = "".join(line.rpartition(",")[0] + "\n" for line in write(results).splitlines())
    assert parse(old) == [results[0], replace(results[1], host_gib=None)]


def test_the_committed_file_keeps_its_figures_when_a_line_is_added(tmp_path: Path) -> None:
    copy = tmp_path / "results.csv"
    copy.write_text(RESULTS.read_text())
    append(copy, result(next_run(read()), "ours"))
    assert read(copy)[:-1] == read()
    assert len(read()) >= 9


def test_lines_are_added_and_runs_counted(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    assert next_run(read(path)) == 1
    append(path, result(1, "ours"))
    append(path, result(1, "hf"))
    assert [one.system for one in read(path)] == ["ours", "hf"]
    assert next_run(read(path)) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]


def test_the_newest_run_that_is_complete_is_shown_by_row() -> None:
    newer = [result(4, "ours", 1600), result(4, "unsloth", 800)]
    elsewhere = [replace(one, run=2, row=OTHER) for one in COMPLETE_RUN]
    found = newest([*elsewhere, *COMPLETE_RUN, *newer], COMPLETE)
    assert {row: of_run[0].run for row, of_run in found.items()} == {OTHER: 2, ROW: 3}
    completed = newest([*COMPLETE_RUN, *newer, result(4, "unsloth-max", 1200)], COMPLETE)
    assert completed[ROW][0].run == 4


def test_repeats_become_their_median_their_spread_and_the_shortest_first_step() -> None:
    repeats = [result(1, "ours", rate, first_step_s=first) for rate, first in ((900, 6.0), (1000, 2.0), (1100, 2.5))]
    summaries = summarise([*repeats, result(1, "unsloth", 500)])
    ours = summaries[0]
    assert (ours.tokens_per_second, ours.spread, ours.first_step_s, ours.repeats) == (1000, 0.2, 2.0, 3)
    assert ratio(summaries, ours, "unsloth") == 2
    assert ratio(summaries, ours, "unsloth-max") is None


def test_systems_take_turns_and_a_single_round_ends_with_ours() -> None:
    def names(entries: list[Entry]) -> str:
        return " ".join(one.system for one in entries)

    assert names(order([ROW], ["ours", "hf"], 2, ["ours"])) == "ours hf ours hf"
    assert names(order([ROW], ["ours", "hf"], 1, ["ours"])) == "ours hf ours"
    assert names(order([ROW], ["ours"], 1, ["ours"])) == "ours"
    assert order([LONGEST_24], SYSTEMS, 1, ["ours"]) == [Entry(LONGEST_24, "ours-smallest")]


def test_on_two_gpus_peers_train_twice_the_tokens() -> None:
    assert [one.system for one in order([TWO_GPUS], SYSTEMS, 1, ["ours"])] == [
        one for one in SYSTEMS if not one.startswith("ours")
    ]
    assert ROWS[TWO_GPUS].tokens == 2 * ROWS[ROW].tokens
    assert TWO_GPUS not in ON_ONE_GPU
    seconds = [expected_seconds(Entry(row, "hf"), [], 6, imported=True) for row in (ROW, TWO_GPUS)]
    assert seconds[0] == seconds[1]


def test_seconds_are_foretold_from_the_newest_speed() -> None:
    entry = Entry(ROW, "ours")
    slow, fast = result(1, "ours", 1000), result(2, "ours", 2000)
    once = expected_seconds(entry, [slow], 6, imported=True)
    twice = expected_seconds(entry, [slow, fast], 6, imported=True)
    assert once - twice == pytest.approx(9 * ROWS[ROW].tokens * (1 / 1000 - 1 / 2000))
    assert expected_seconds(entry, [slow], 6, imported=False) > once
    assert expected_seconds(Entry(ROW, "hf"), [slow], 6, imported=True) < once


def search_on(card: float, bytes_per_token: float, base: float, most: int = 131_072) -> list[Attempt]:
    """The search where memory is linear, and a length is out of memory as soon as it exceeds the card's bytes."""
    limit, attempts = int(card * GIB), list[Attempt]()
    while (tokens := next_length(attempts, limit, 8192, most)) is not None:
        peak = int(base * GIB + tokens * bytes_per_token)
        attempts.append(Attempt(tokens, peak if peak <= limit else None, 1.0, {}))
        assert tokens % GRAIN == 0
        assert tokens <= most
    return attempts


@pytest.mark.parametrize("per_token", [60_000, 90_000, 216_000, 400_000])
def test_the_search_finds_the_longest_within_two_per_cent_in_few_attempts(per_token: int) -> None:
    attempts = search_on(23.5, per_token, 5.6)
    longest = max(one.tokens for one in attempts if one.peak is not None)
    possible = min(131_072, (23.5 - 5.6) * GIB / per_token)
    assert possible * 0.98 - GRAIN <= longest <= possible
    assert len(attempts) <= 5


def test_the_search_steps_back_where_memory_is_fragmented() -> None:
    """Out of memory at 92 % of the card, whatever the prediction from peaks says."""
    limit, attempts = int(23.5 * GIB), list[Attempt]()
    while (tokens := next_length(attempts, limit, 8192, 131_072)) is not None:
        peak = int(5.6 * GIB + tokens * 216_000)
        attempts.append(Attempt(tokens, peak if peak <= 0.92 * limit else None, 1.0, {}))
    longest = max(one.tokens for one in attempts if one.peak is not None)
    assert longest >= 0.93 * (0.92 * 23.5 - 5.6) * GIB / 216_000


def test_the_search_ends_where_nothing_fits() -> None:
    attempts = search_on(5.0, 216_000, 5.6)
    assert attempts
    assert all(one.peak is None for one in attempts)


def test_an_attempt_that_would_take_too_long_is_not_made() -> None:
    attempts = [Attempt(8192, 1, 2.0, {}), Attempt(24_576, 2, 8.0, {})]
    assert not affordable(attempts, 98_304, 32.0)  # four times the tokens at the least
    assert affordable(attempts, 98_304, 128.0)  # sixteen times at the most
    assert affordable([], 98_304, 0.0)


def test_generated_files_are_fresh_and_a_stale_one_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chart.main(["--check"]) == 0
    monkeypatch.setattr(chart, "read", lambda: COMPLETE_RUN)
    assert chart.main(["--check"]) == 1
    stale = capsys.readouterr().err
    assert stale.count("is stale") == 3
    assert "docs/speed.svg" in stale
    assert "docs/benchmarks.md" in stale
    assert "README.md" in stale


def test_the_page_names_speeds_ratios_and_where_they_are_from() -> None:
    longest = result(5, "ours-smallest", row=LONGEST_24, max_tokens=90_112, peak_gib=23.1, host_gib=7.25)
    text = benchmarks_page([*COMPLETE_RUN, longest])
    assert text.startswith(BENCHMARKS_HEADER)
    assert "| this project | 1,500 | 1.25x | 1.88x | 6.50 | 2.0 |" in text
    assert "| Llama 8B | 24 GB | 90,112 tokens | 23.10 | 7.2 | 78,475 (1.1x) | 5, abc |" in text
    assert "emulated" in text
    assert "run 3 on one GPU, commit abc; torch 2" in text


def test_readme_has_a_row_for_each_model_beside_unsloth_at_its_fastest() -> None:
    elsewhere = [replace(one, run=2, row=OTHER) for one in COMPLETE_RUN]
    default_is_faster = [result(3, "ours", 1500), result(3, "unsloth-max", 800), result(3, "unsloth", 1000)]
    text = readme_section([*elsewhere, *default_is_faster])
    assert "| Llama 8B, 8,192 tokens, batch 1 x 2 | 1,500 | 1,200 | 1.25x | 6.50 | 6.50 |" in text
    assert "| Llama 8B, 2,048 tokens, batch 2 x 4 | 1,500 | 1,000 | 1.50x | 6.50 | 6.50 |" in text
    assert "one GPU (runs 2 and 3, commit abc)" in text
    assert "(docs/benchmarks.md)" in text


def test_readme_shows_one_chart_and_a_row_for_each_model() -> None:
    text = readme_section(read())
    assert text.count("![") == 1
    assert len(re.findall("^[|] [A-Z]", text, re.MULTILINE)) == 11
    runs = "9, 10, 11, 17, 21, 24, 25, 26 and 38"
    assert f"(runs {runs}, commits 0db03f5, 12326e5, 5878a14, 83a4e34, ad5a579 and f134290)" in text


def test_the_section_stands_between_the_marks() -> None:
    text = readme_section(COMPLETE_RUN)
    old = f"before\n{chart.BEGIN}old\n{chart.END}after\n"
    assert chart.replace_section(old, text) == f"before\n{chart.BEGIN}{text}{chart.END}after\n"
    with pytest.raises(ValueError, match="has no generated section"):
        chart.replace_section("no marks", text)


def test_a_peer_that_the_shown_run_lacks_is_compared_with_this_project_in_its_own_run() -> None:
    older = [result(1, "ours", 900), result(1, "hf", 500), result(2, "ours", 1000), result(2, "hf", 400)]
    text = benchmarks_page([*older, *COMPLETE_RUN])
    assert "in other runs: this project has 2.50x the speed of HF + TRL (run 2)." in text
    assert "in other runs" not in benchmarks_page(COMPLETE_RUN)
    assert "in other runs" not in benchmarks_page([*older[1:2], *COMPLETE_RUN]), "not beside this project"


SVG = "{http://www.w3.org/2000/svg}"


def test_the_chart_is_well_formed_deterministic_and_inside_its_frame() -> None:
    results = [result(3, system, 1000.0 + index) for index, system in enumerate(SYSTEMS)]
    text = chart.picture(results)
    assert text == chart.picture(list(results))
    assert "matplotlib v" not in text.lower(), "no version: equal bytes with the next one, where it draws the same"

    root = ET.fromstring(text)
    groups = [one for one in root.iter(f"{SVG}g") if one.get("id", "").startswith("bar-")]
    assert {one.attrib["id"] for one in groups} == {
        f"bar-0-{kind}-{one}" for kind in ("speed", "memory") for one in SYSTEMS
    }

    outlines = [one.attrib["d"] for group in groups for one in group.iter(f"{SVG}path")]
    assert len(outlines) == 2 * len(SYSTEMS)
    points = [tuple(map(float, pair)) for line in outlines for pair in re.findall(r"([\d.]+) ([\d.]+)", line)]
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert width == WIDTH
    assert max(x for x, _ in points) < WIDTH - 30  # room for the value
    assert 0 < min(y for _, y in points) < max(y for _, y in points) < height
    assert set(LABELS.values()) <= {one.text for one in root.iter(f"{SVG}text")}


def test_bars_are_as_long_as_their_values_and_this_project_stands_out() -> None:
    root = ET.fromstring(chart.picture(COMPLETE_RUN))
    bars = {one.attrib["id"]: one[0] for one in root.iter(f"{SVG}g") if one.get("id", "").startswith("bar-0-speed")}

    def length(bar: ET.Element) -> float:
        xs = [float(x) for x, _ in re.findall(r"([\d.]+) ([\d.]+)", bar.attrib["d"])]
        return max(xs) - min(xs)

    ours, peer = bars["bar-0-speed-ours"], bars["bar-0-speed-unsloth-max"]
    assert length(ours) / length(peer) == pytest.approx(1500 / 1200)
    assert ours.attrib["style"] != peer.attrib["style"]
    assert "1,500  (1.25x)" in [one.text for one in root.iter(f"{SVG}text")]


def test_every_system_has_a_label() -> None:
    assert set(LABELS) == set(SYSTEMS)
