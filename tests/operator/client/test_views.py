"""Terminal texts of many jobs, the cleaning of hostile text, and an installation without the trainer's packages."""

import io
import subprocess
import sys
import time
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from finetune_client.errors import ClientError, Exit
from finetune_client.pods import _lines
from finetune_client.rows import Row, sorted_rows
from finetune_client.show import _job_table, top_tables
from finetune_client.terminal.text import MAX_CHARACTERS, clean
from finetune_client.terminal.usage import describe_usage
from finetune_client.watch import Board, watch_jobs

BLOCKED = ("torch", "transformers", "boto3", "trl", "peft", "datasets", "numpy", "kopf", "aiohttp", "jinja2")
WITHOUT_TRAINER = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.split(".")[0])
sys.meta_path.insert(0, Absent())
from finetune_trainer.cli.finetune import main
main()
"""


def a_job(name: str, phase: str, *, loss: float | None = None, percent: int = 0, **more: Any) -> dict[str, Any]:
    progress = {"percent": percent, "step": percent * 2, "totalSteps": 200, "loss": loss, "eta": "12m30s"}
    return {
        "metadata": {"name": name, "namespace": "team-a", "uid": name},
        "spec": {"resources": {"gpus": 1}, "scheduling": {"queueName": "gpus"}},
        "status": {"phase": phase, "reason": phase, "progress": progress if loss else {}} | more,
    }


def drawn(what: Any, width: int = 120) -> list[str]:
    out = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    out.print(what)
    return [line.rstrip() for line in out.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_the_board_shows_bars_and_the_losses_since_the_watch_began() -> None:
    board = Board()
    for loss, percent in ((4.0, 10), (3.0, 20), (2.0, 30), (1.5, 40)):
        jobs = [a_job("bot", "Running", loss=loss, percent=percent), a_job("later", "Queued")]
        changed = board.update(jobs)
    assert [row.name for row in changed] == ["bot"]
    assert board.update(jobs) == []

    assert drawn(board.draw(120, 30, everywhere=False)) == [
        "JOB    PHASE    DONE                         STEP    LOSS    CURVE  LEFT",
        "bot    Running  ━━━━━━━━               40 %  80/200  1.5000  █▅▂▁   12m30s",
        "later  Queued                           0 %",
        "2 jobs hold 1 GPU; Ctrl-C ends the watch, not the jobs",
    ]


def test_jobs_that_do_not_fit_are_counted() -> None:
    board = Board()
    board.update([a_job(f"job-{number}", "Queued") for number in range(30)])
    assert "25 more not shown" in drawn(board.draw(120, 10, everywhere=True))[-1]


def test_top_adds_up_what_jobs_hold_and_wait_for() -> None:
    jobs = [
        a_job("a", "Running", loss=1, percent=50),
        a_job("b", "Queued"),
        a_job("c", "Failed"),
        a_job("d", "Uploading"),
    ]
    assert [line for fitted in top_tables(sorted_rows(jobs), 120) for line in (*drawn(fitted.table), "")] == [
        "NAMESPACE  NAME  QUEUE  PHASE      GPUS  RESOURCE        PROGRESS  ETA",
        "team-a     a     gpus   Running    1     nvidia.com/gpu  50%       12m30s",
        "team-a     d     gpus   Uploading  1     nvidia.com/gpu  0%",
        "team-a     b     gpus   Queued     1     nvidia.com/gpu  0%",
        "",
        "NAMESPACE  QUEUE  RESOURCE        HELD  WAITED FOR",
        "team-a     gpus   nvidia.com/gpu  2     1",
        "",
    ]


USED = {
    "all of it": (
        {"cost": 3.5, "currency": "EUR", "energyWattHours": 840.25, "energyMeasuredGpuSeconds": 5040},
        "1.40 GPU hours, waited 1m05s, 3.50 EUR, 840.2 Wh",
    ),
    "what nobody knows": ({}, "1.40 GPU hours, waited 1m05s, cost unknown, energy not measured"),
    "energy of some pods": (
        {"cost": 3.5, "currency": "EUR", "energyWattHours": 1840.2, "energyMeasuredGpuSeconds": 2520},
        "1.40 GPU hours, waited 1m05s, 3.50 EUR, 1.84 kWh in 50% of that time",
    ),
    "a job that has ended": (
        {"estimateErrorPercent": -12.4},
        "1.40 GPU hours (12 % less than estimated), waited 1m05s, cost unknown, energy not measured",
    ),
}


@pytest.mark.parametrize(("usage", "expected"), USED.values(), ids=USED)
def test_what_a_job_has_used_is_said_in_words(usage: dict[str, Any], expected: str) -> None:
    used = {"gpuSeconds": 5040, "waitingSeconds": 65} | usage
    assert describe_usage({"status": {"usage": used}}) == expected
    assert describe_usage({"status": {"usage": {"gpuSeconds": 0}}}) == ""
    assert describe_usage({"status": {"usage": "x"}}) == ""


def many_jobs() -> list[dict[str, Any]]:
    """Jobs of every kind, with long names, as a terminal has to show them."""
    waiting = {"status": {"phase": "Queued", "reason": "Unschedulable"}}
    return [
        a_job("customer-support-llama-3-8b-2026-11", "Running", loss=1.2345, percent=47, reason="Training"),
        a_job("bot", "Failed", reason="GpuBudgetExhausted"),
        a_job("summaries", "Queued") | waiting,
    ]


@pytest.mark.parametrize("width", [110, 80, 60, 40])
def test_a_watch_is_readable_on_a_narrow_terminal(width: int) -> None:
    board = Board()
    for loss in (3.0, 2.0, 1.0):
        jobs = many_jobs()
        jobs[0]["status"]["progress"]["loss"] = loss
        board.update(jobs)
    lines = drawn(board.draw(width, 30, everywhere=False), width)
    assert all(cell_len(line) <= width for line in lines)
    header, first, *_ = lines
    assert header.startswith("JOB")
    assert "customer" in first
    assert "Running" in first
    assert "47 %" in first
    assert any("GpuBudg" in line and "bot" in line for line in lines), "why a job failed stays, if need be cut"
    assert "━━━" in first, "a live bar"
    assert ("█▅▁" in first) is (width >= 80), "the curve of the losses"
    assert ("not shown at this width" in " ".join(lines)) is (width < 110)


@pytest.mark.parametrize("width", [80, 60, 40])
@pytest.mark.parametrize("wide", [False, True])
def test_a_list_is_readable_on_a_narrow_terminal(width: int, wide: bool) -> None:
    fitted = _job_table(sorted_rows(many_jobs()), width, everywhere=True, wide=wide)
    lines = drawn(fitted.table, width)
    assert all(cell_len(line) <= width for line in lines)
    assert all(len(line.split()) >= 3 for line in lines), "namespace, name and phase"
    assert any("Failed" in line for line in lines)
    if width == 80:
        assert "customer-support-llama" in lines[2]
        assert "GpuBudgetExhausted" in lines[1]
    hidden = set(fitted.note.removeprefix("not shown at this width: ").split(", "))
    shown = {title.rstrip("…") for title in lines[0].lower().split()}
    everything = {"namespace", "name", "phase", "reason", "progress", "loss", "eta", "age"}
    everything |= {"steps", "retries", "gpus"} if wide else set()
    lost = {each for each in everything - hidden if not any(each.startswith(title) for title in shown)}
    assert not lost - {"steps"}, "a column is shown, or named as not shown; the one without a value goes without a word"


@pytest.mark.parametrize("width", [80, 60])
def test_top_is_readable_on_a_narrow_terminal(width: int) -> None:
    jobs, queues = top_tables(sorted_rows(many_jobs()), width)
    for fitted in (jobs, queues):
        assert all(cell_len(line) <= width for line in drawn(fitted.table, width))
    first = drawn(jobs.table, width)[1]
    assert first.split()[:1] == ["team-a"]
    assert "custom" in first
    assert "Running" in first
    assert drawn(queues.table, width)[0].split() == ["NAMESPACE", "QUEUE", "RESOURCE", "HELD", "WAITED", "FOR"]


def test_columns_that_hold_nothing_go_without_a_word() -> None:
    board = Board()
    board.update([a_job("later-and-with-a-longer-name", "Queued")])
    assert not any("not shown" in line for line in drawn(board.draw(54, 30, everywhere=False), 54))


def test_a_row_survives_a_status_of_another_shape() -> None:
    job = a_job("odd", "Running", progress={"percent": "many", "step": [], "loss": {}}, conditions=["x"])
    row = Row.of(job | {"spec": None})
    assert (row.percent, row.step, row.loss, row.gpus) == (0, None, None, 1)


def test_text_is_cleaned_and_bounded() -> None:
    assert (
        clean("\x1b[31mred\x1b[0m \x1b]8;;https://evil\x1b\\link\x1b]8;;\x07 \x9b2Jx\u202ey\x00\nz") == "red link xy z"
    )
    assert len(clean("a" * 10**6)) == MAX_CHARACTERS
    assert clean("plain ü 漢") == "plain ü 漢"


def test_a_log_is_split_into_lines_however_it_comes_and_an_endless_line_is_cut() -> None:
    class Answer:
        def stream(self, _: int) -> Any:
            yield from (b"one\ntw", b"o\nthr", b"ee", b"x" * 40_000, b"\nlast")

    lines = list(_lines(Answer()))
    assert lines[:2] == ["one", "two"]
    assert lines[-1] == "last"
    assert sum(map(len, lines)) == len("onetwothreelast") + 40_000


def test_the_commands_of_a_cluster_need_no_trainer_and_others_say_what_is_missing() -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", WITHOUT_TRAINER, *words], capture_output=True, text=True, check=False
        )

    began = time.monotonic()
    assert "create a job in the cluster" in run("--help").stdout
    assert time.monotonic() - began < 1
    assert "--all-namespaces" in run("list", "--help").stdout
    assert run("list", "--kubeconfig", "/nonexistent/config").returncode == 5

    local = run("chat", "results/mine")
    assert local.returncode == 2
    assert "pip install 'finetune-operator[trainer]'" in local.stderr
    assert "Traceback" not in local.stderr


class PlayedCluster:
    """A cluster whose job is further at each look, and that is away once; test_commands.py has the real one."""

    def __init__(self, end: str) -> None:
        self.looks = iter((a_job("bot", "Running", loss=2, percent=50), None, a_job("bot", end, loss=1, percent=100)))

    def get_job(self, _: str) -> dict[str, Any]:
        job = next(self.looks)
        if job is None:
            raise ClientError("the cluster at x cannot be reached", Exit.NO_CLUSTER)
        return job


@pytest.mark.parametrize(("end", "code"), [("Succeeded", 0), ("Failed", 7)])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_watch_ends_with_its_job_and_outlives_a_cluster_that_is_away(end: str, code: int, terminal: bool) -> None:
    file = io.StringIO()
    out = Console(file=file, width=120, height=30, force_terminal=terminal, _environ={"TERM": "xterm"})
    cluster: Any = PlayedCluster(end)
    assert watch_jobs(cluster, out, ["bot"], interval=0) == code
    assert "the cluster at x cannot be reached" in file.getvalue()
    assert end in file.getvalue()
    assert ("\x1b[" in file.getvalue()) is terminal
