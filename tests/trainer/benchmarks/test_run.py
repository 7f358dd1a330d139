"""The driver with processes that only pretend to train: what it starts, when, and what it makes of their ends."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from speed.children import Child, MeasurementError
from speed.results import read
from speed.run import main, parse_arguments

FOUND = {
    "gpu": "Pretended", "tokens_per_second": 1000.0, "spread": 0.01, "peak_gib": 2.5, "planned_gib": None,
    "first_step_s": 1.5, "grad_norm": 0.3, "loss": 5.0,
}  # fmt: skip
PREAMBLE = "import sys, time, json; print('imported', flush=True); sys.stdin.readline(); "
ROW = "8b-2048-bs2-ga4"


class Processes:
    """Starts small programs in place of measurements; remembers them."""

    def __init__(self, folder: Path, programs: dict[str, str] | None = None) -> None:
        self.folder, self.programs = folder, programs or {}
        self.started: list[str] = []

    def __call__(self, module: str, arguments: Sequence[str], log: str) -> Child:
        name = arguments[0]
        self.started.append(name)
        if module == "models.checkpoint":
            program = self.programs.get(name, "pass")
        else:
            found = FOUND | {"system": name, "row": arguments[1]}
            train = self.programs.get(name, f"print('TRAINING', flush=True); print('RESULT', {json.dumps(found)!r})")
            program = PREAMBLE + train
        return Child([sys.executable, "-c", program], self.folder / f"{len(self.started)}-{log}.log")


def bench(tmp_path: Path, processes: Processes, *words: str) -> int:
    return main(["--rows", ROW, "--results", str(tmp_path / "results.csv"), "--commit", "abc", *words], processes)


def test_results_of_one_call_share_a_run_and_the_next_call_has_the_next(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    assert bench(tmp_path, processes, "--systems", "ours,unsloth-max", "--repeats", "2") == 0
    assert bench(tmp_path, processes, "--systems", "hf") == 0
    made = read(tmp_path / "results.csv")
    assert [(one.run, one.system) for one in made] == [
        (1, "ours"), (1, "unsloth-max"), (1, "ours"), (1, "unsloth-max"), (2, "hf"),
    ]  # fmt: skip
    assert {one.commit for one in made} == {"abc"}
    assert processes.started.count("llama-8b") == 2  # once for each call


def test_what_fails_is_said_and_the_others_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    processes = Processes(tmp_path, {"hf": "raise RuntimeError('no such kernel')"})
    assert bench(tmp_path, processes, "--systems", "hf,ours", "--again", "") == 1
    said = capsys.readouterr().out
    assert "no such kernel" in said
    assert f"failed: {ROW} hf" in said
    assert [one.system for one in read(tmp_path / "results.csv")] == ["ours"]


def test_a_model_that_cannot_be_made_leaves_its_rows_out_only(tmp_path: Path) -> None:
    processes = Processes(tmp_path, {"llama-8b": "raise SystemExit(3)"})
    words = ["--rows", f"{ROW},1b-2048-bs4-ga2", "--systems", "ours", "--results", str(tmp_path / "results.csv")]
    assert main(words, processes) == 1
    assert [one.row for one in read(tmp_path / "results.csv")] == ["1b-2048-bs4-ga2"]


def test_nothing_is_started_that_would_not_end_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    processes = Processes(tmp_path)
    assert bench(tmp_path, processes, "--systems", "ours,hf", "--seconds", "10") == 1
    assert f"left out for lack of time: {ROW} ours, {ROW} hf" in capsys.readouterr().out.replace("\n", " ")
    assert not (tmp_path / "results.csv").exists()


def test_a_measurement_beyond_the_deadline_is_ended(tmp_path: Path) -> None:
    child = Child([sys.executable, "-c", PREAMBLE + "time.sleep(60)"], tmp_path / "log")
    child.go()
    began = time.monotonic()
    with pytest.raises(MeasurementError, match="no result within 1 s"):
        child.result(1.0, ignore)
    assert time.monotonic() - began < 10


def test_the_next_process_stands_still_while_one_trains(tmp_path: Path) -> None:
    ticks = "print('tick', flush=True); time.sleep(0.02); " * 400
    beside = Child([sys.executable, "-c", "import time; " + ticks], tmp_path / "beside")
    wait_for(lambda: count(tmp_path / "beside") > 3)
    beside.pause()
    time.sleep(0.3)
    before = count(tmp_path / "beside")
    time.sleep(0.5)
    assert count(tmp_path / "beside") == before
    beside.resume()
    wait_for(lambda: count(tmp_path / "beside") > before + 3)
    beside.kill()


def test_the_driver_pauses_and_resumes_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(Child, "pause", lambda child: seen.append(("pause", id(child))))
    monkeypatch.setattr(Child, "resume", lambda child: seen.append(("resume", id(child))))
    assert bench(tmp_path, Processes(tmp_path), "--systems", "ours,hf,liger", "--again", "") == 0
    assert [word for word, _ in seen] == ["pause", "resume"] * 2
    assert seen[0][1] == seen[1][1] != seen[2][1] == seen[3][1]


def test_results_are_copied_as_they_come(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert bench(tmp_path, Processes(tmp_path), "--systems", "ours", "--copy", str(tmp_path / "out")) == 0
    assert (tmp_path / "out/results.csv").read_text() == (tmp_path / "results.csv").read_text()


@pytest.mark.parametrize(("words", "said"), [(["--rows", "7b"], "7b"), (["--systems", "ours,theirs"], "theirs")])
def test_unknown_names_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(words)
    assert said in capsys.readouterr().err


def count(log: Path) -> int:
    return log.read_text().count("tick")


def ignore(line: str) -> None:
    assert not line.startswith("RESULT")


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
