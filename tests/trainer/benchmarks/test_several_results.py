"""The table of several GPUs: a line beside one GPU of its own call, peers beside the call of their commit."""

from pathlib import Path

import pytest

from speed.charts import gpus
from speed.results import Result
from speed.several.results import SEVERAL, Measured, newest_of, read

HEADER = SEVERAL.read_text(encoding="utf-8").splitlines()[0]


def line(row: str, count: int, rate: float, **more: object) -> str:
    """A line of the file."""
    known = {"row": row, "gpus": count, "tokens_per_second": rate, "peak_gib": 30.5, "gpu": "GPU X", **more}
    return ",".join(str(known.get(name, "")) for name in HEADER.split(","))


def calls(tmp_path: Path, *lines: str) -> list[list[Measured]]:
    path = tmp_path / "several_gpus.csv"
    path.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    return read(path)


def peer(system: str, rate: float, commit: str, count: int = 2) -> Result:
    row = f"8b-2048-bs2-ga4-gpus{count}"
    return Result(1, row, system, rate, 0.01, 21.1, None, None, 2.0, 0.3, f"{count} x GPU X", "torch 2", commit)


def test_a_line_is_compared_with_one_gpu_of_its_own_call(tmp_path: Path) -> None:
    found = calls(
        tmp_path,
        line("one", 1, 1000, commit="old"), line("replicated", 2, 1800, commit="old"),
        line("sharded", 2, 1700, commit="old", parallelism="Sharded"),
        line("one", 1, 1200, commit="new"), line("replicated", 2, 2400, commit="new"),
    )  # fmt: skip
    assert [[one.row for one in call] for call in found] == [["one", "replicated", "sharded"], ["one", "replicated"]]
    assert newest_of(found, "sharded", 4) is None
    assert gpus.readme_table(found, [])[2:] == [
        "| one GPU | 1,200 |  | 30.50 |",
        "| two GPUs | 2,400 | 2.00x | 30.50 |",
        "| two GPUs, weights shared out | 1,700 | 1.70x | 30.50 |",
    ]


def test_lines_from_before_the_first_call_are_left_out(tmp_path: Path) -> None:
    assert calls(tmp_path, line("8b-2048-bs2-ga4", 2, 900)) == []


def test_a_large_model_has_its_card_and_the_speed_of_a_gpu(tmp_path: Path) -> None:
    sharded = line("large-sharded", 4, 6200, card_gib=24.0, parallelism="Sharded")
    (*_, last) = gpus.readme_table(calls(tmp_path, line("one", 1, 1000), sharded), [])
    assert last == "| Llama 70B, shared out over four cards of 24 GiB | 6,200 | 1,550 a GPU | 30.50 |"


@pytest.mark.parametrize(("commit", "expected"), [("new", "this project is 2.00x"), ("old", "this project is 1.50x")])
def test_a_peer_is_compared_with_the_call_of_its_commit(commit: str, expected: str, tmp_path: Path) -> None:
    found = calls(
        tmp_path,
        line("one", 1, 1000, commit="old"), line("replicated", 2, 1800, commit="old"),
        line("one", 1, 1200, commit="new"), line("replicated", 2, 2400, commit="new"),
    )  # fmt: skip
    (*_, last) = gpus.readme_table(found, [peer("unsloth-max", 1200, commit), peer("hf", 1, "never beside us")])
    assert last == f"| Unsloth, KEEP_LAYERS=max, two GPUs | 1,200 | {expected} | 21.10 |"


def test_the_profile_says_where_the_time_of_a_step_goes(tmp_path: Path) -> None:
    profiled = {"step_ms": 914.5, "all_reduce_ms": 0.87, "waiting_ms": 49.41, "planned_gib": 31.23}
    shared = profiled | {"gathers_ms": 251.5, "exposed_gathers_ms": 5.2, "parallelism": "Sharded"}
    found = calls(
        tmp_path, line("one", 1, 1000), line("replicated", 4, 3900, **profiled), line("sharded", 4, 3700, **shared)
    )
    assert gpus.profile_table(found)[2:] == [
        "| four GPUs | 914 | 0.87 | 49.4 |  | 31.23 |",
        "| four GPUs, weights shared out | 914 | 0.87 | 49.4 | 252 (5.2) | 31.23 |",
    ]


def test_the_committed_file_keeps_what_was_promised() -> None:
    """Of four GPUs, and of two: multiples of one GPU, and the part of it that shared weights leave."""
    for count, least in ((4, 3.7), (2, 1.9)):
        replicated = newest_of(read(), "replicated", count)
        sharded = newest_of(read(), "sharded", count)
        assert replicated is not None
        assert sharded is not None
        assert replicated[0].tokens_per_second >= least * replicated[1].tokens_per_second
        assert sharded[0].tokens_per_second >= 0.9 * replicated[0].tokens_per_second
