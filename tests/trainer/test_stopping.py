"""A request to stop is seen by loops and waits, and waited for where something has to be finished."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainer import stopping
from finetune_trainer.chat.sandbox.process import RenderingLimits, RenderingProcess, TemplateSetup
from finetune_trainer.data.rows import read_rows
from finetune_trainer.errors import InterruptedRunError, TrainerError
from finetune_trainer.storage.digests import digest_file, sha256_file
from finetune_trainer.storage.retry import Cause, RetryPolicy, retry

SILENCE = 20.0  # seconds; far more than any of these tests takes
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def clean_flag() -> Iterator[None]:
    stopping.reset()
    yield
    stopping.reset()


def soon() -> None:
    """Asks to stop in 0.1 s."""
    threading.Timer(0.1, stopping.request_stop, ["SIGTERM"]).start()


def test_what_is_silent_is_left_alone() -> None:
    soon()
    began = time.monotonic()
    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        stopping.run_abandonable(lambda: time.sleep(SILENCE))
    assert time.monotonic() - began < 1


def test_what_has_to_be_finished_is_waited_for() -> None:
    soon()
    with stopping.finishing():
        assert stopping.run_abandonable(lambda: time.sleep(0.3) or 7) == 7
        stopping.stop_point()
        with pytest.raises(InterruptedRunError):
            stopping.raise_if_requested()
    with pytest.raises(InterruptedRunError):
        stopping.stop_point()


def test_results_and_errors_come_through() -> None:
    assert stopping.run_abandonable(lambda: 7) == 7
    with pytest.raises(KeyError):
        stopping.run_abandonable(lambda: {}["absent"])


def test_cleaning_up_takes_no_longer_than_it_may() -> None:
    assert stopping.run_within(5, lambda: None)
    assert not stopping.run_within(0.1, lambda: time.sleep(SILENCE))


def test_requests_are_neither_repeated_nor_waited_for() -> None:
    def action() -> None:
        raise ConnectionError

    def explain(_: Exception) -> tuple[TrainerError, Cause]:
        return TrainerError("StorageUnavailable", "no answer"), Cause.OUTAGE  # type: ignore[arg-type]

    soon()
    began = time.monotonic()
    with pytest.raises(InterruptedRunError):
        retry(action, RetryPolicy(first_wait=SILENCE), (ConnectionError,), explain)
    assert time.monotonic() - began < 1


def test_reading_and_hashing_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 10)
    rows = read_rows((path,))
    next(rows)
    stopping.request_stop("SIGTERM")
    for stopped in (lambda: next(rows), lambda: sha256_file(path), lambda: digest_file(path, 1 << 20)):
        with pytest.raises(InterruptedRunError):
            stopped()


def test_a_template_that_renders_for_long_is_ended_with_its_process() -> None:
    process = RenderingProcess(RenderingLimits(seconds=int(SILENCE)))
    message = {"role": "user", "content": "a"}
    request = {"messages": [message], "tools": None, "spans": False, "reasoning": False, "asked": False}
    assert "error" not in process.ask(TemplateSetup("{{ messages[0].content }}", {}, ()), request)

    soon()
    began = time.monotonic()
    with pytest.raises(InterruptedRunError):
        process.ask(TemplateSetup(ENDLESS, {}, ()), request)
    assert time.monotonic() - began < 3
    assert process._process is None
