"""When a run counts as stalled: the limit and how it adapts, what counts as a sign of life, and what does not."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune_api.pod_ends.stalls import DEFAULT_STALL_SECONDS, StallLimit
from finetune_trainer import signs_of_life, stopping
from finetune_trainer.job import watchdog
from finetune_trainer.job.stacks import innermost_frame, name_threads
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.job.watchdog import MAX_ADAPTED_SECONDS, Silence, Stall, Watchdog, read_traffic

LIMITS = {
    "the default": (None, (), DEFAULT_STALL_SECONDS),
    "the default after short pauses": (None, (10, 20), DEFAULT_STALL_SECONDS),
    "the default on a slow machine": (None, (900, 20), 2700),
    "the default after hours": (None, (9000,), MAX_ADAPTED_SECONDS),
    "what the user wrote": (60, (50, 10), 60),
}


@pytest.mark.parametrize(("wanted", "pauses", "limit"), LIMITS.values(), ids=LIMITS)
def test_a_run_that_came_through_a_pause_may_make_a_longer_one(
    wanted: int | None, pauses: tuple[int, ...], limit: int
) -> None:
    silence = Silence(StallLimit.of(wanted))
    for pause in pauses:
        silence.add(pause, is_alive=True)
    assert (silence.limit, silence.seconds) == (limit, 0)


def test_time_adds_up_until_a_sign_of_life() -> None:
    silence = Silence(StallLimit.of(60))
    for _ in range(3):
        silence.add(15, is_alive=False)
    assert silence.seconds == 45
    silence.add(5, is_alive=True)
    assert silence.seconds == 0


def watch(limit: int, seconds: float, alive: float | None = None) -> list[Stall]:
    """Watches for some seconds; with a sign of life every `alive` seconds."""
    found: list[Stall] = []
    dog = Watchdog(StallLimit(seconds=limit, adapts=False), found.append)
    dog.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(alive or 0.05)
        if alive:
            signs_of_life.beat()
    dog.close()
    return found


def test_a_run_without_a_sign_of_life_is_stalled_and_all_its_threads_are_in_the_log(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    never = threading.Event()
    threading.Thread(target=never.wait, name="a loader", daemon=True).start()
    (stall,) = watch(1, 1.5)
    never.set()
    assert stall.seconds == 1
    assert "test_watchdog.py" in stall.frame
    stacks = capfd.readouterr().err
    assert "in watch" in stacks
    assert stacks.count("Thread 0x") >= 2
    assert "is a loader" in caplog.text


def test_a_sign_of_life_in_time_keeps_a_run() -> None:
    assert watch(1, 2.5, alive=0.6) == []


def test_waiting_is_no_sign_of_life_and_getting_on_is() -> None:
    StopSignal()
    before = signs_of_life.last_beat()
    stopping.run_abandonable(lambda: time.sleep(0.2))
    stopping.wait_point()
    assert signs_of_life.last_beat() == before
    stopping.stop_point()
    assert signs_of_life.last_beat() > before


def test_traffic_of_files_is_counted(tmp_path: Path) -> None:
    before = read_traffic()
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    assert (tmp_path / "file").read_bytes()
    assert read_traffic() - before >= 2 << 20


def test_traffic_of_libraries_keeps_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = iter(range(0, 1 << 40, watchdog.TRAFFIC_BYTES))
    monkeypatch.setattr(watchdog, "read_traffic", lambda: next(moved))
    assert watch(1, 1.5) == []


def test_a_process_that_was_frozen_is_not_ended_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reading of the clock is an hour later, as if each tick had been a freeze of an hour."""
    hours = iter(range(0, 1 << 20, 3600))
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: float(next(hours))))
    found: list[Stall] = []
    dog = Watchdog(StallLimit(seconds=4, adapts=False), found.append)
    dog._thread.start()
    threading.Event().wait(0.5)  # two ticks, of which each counts as 0.4 s at most
    dog.close()
    assert found == []


def test_a_watch_that_ends_late_leaves_no_timer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower trains on for hours after its watch: a timer that is left would end it."""
    is_late, goes_on = threading.Event(), threading.Event()
    timers: list[str] = []

    def set_late(seconds: float, **named: bool) -> None:
        is_late.set()
        goes_on.wait()
        timers.append(f"{seconds:.1f} s, {named}")

    recorder = SimpleNamespace(dump_traceback_later=set_late, cancel_dump_traceback_later=timers.clear)
    monkeypatch.setattr(watchdog, "faulthandler", recorder)
    dog = Watchdog(StallLimit(seconds=1, adapts=False), [].append, is_watched=False)
    dog.start()
    assert is_late.wait(10)
    dog.close()  # gives the thread a second
    goes_on.set()
    dog._thread.join(10)
    assert not timers


def test_the_place_is_that_of_the_work_that_the_main_thread_waits_for() -> None:
    StopSignal()
    seen: list[str] = []

    def read_from_the_store() -> None:
        time.sleep(0.5)

    def look() -> None:
        time.sleep(0.2)
        seen.append(innermost_frame())

    threading.Thread(target=look).start()
    stopping.run_abandonable(read_from_the_store)
    assert seen[0].endswith("in read_from_the_store")
    assert "is MainThread" in name_threads()
