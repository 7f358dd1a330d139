"""The way from one pod to another: waiting for a pod that is not there, and an end for one that nothing reaches."""

import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_test_models.ranks.nodes import free_port
from finetune_trainer import stopping
from finetune_trainer.distributed.nodes import reach
from finetune_trainer.distributed.nodes.place import Place
from finetune_trainer.distributed.nodes.same_rows import share_rows
from finetune_trainer.errors import TrainerError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping.reset()
    monkeypatch.setattr(reach, "POLL_SECONDS", 0.05)


def a_place(host: str = "127.0.0.1") -> Place:
    return Place.parse(1, 2, f"{host}:{free_port()}")


def test_a_trainer_that_starts_late_is_waited_for() -> None:
    place = a_place()
    opened: list[socket.socket] = []
    timer = threading.Timer(0.5, lambda: opened.append(socket.create_server((place.host, place.port))))
    timer.start()

    began = time.monotonic()
    assert reach.await_leader(place, blocked_seconds=0.1) == "127.0.0.1", "a refusal is an answer"
    assert time.monotonic() - began >= 0.5
    timer.join()
    opened[0].close()


def test_a_pod_without_an_address_is_waited_for_until_the_run_is_stopped() -> None:
    threading.Timer(0.5, stopping.request_stop, ["SIGTERM"]).start()
    with pytest.raises(TrainerError) as ended:
        reach.await_leader(a_place("tiny-0.nodes-tiny.invalid"), blocked_seconds=0.1)
    assert ended.value.reason is FailureReason.INTERRUPTED


def test_a_network_that_drops_packets_is_named_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_knock", lambda *_: TimeoutError)
    place = a_place()
    with pytest.raises(TrainerError) as ended:
        reach.await_leader(place, blocked_seconds=0.2)
    assert (ended.value.reason, ended.value.exit_code) == (FailureReason.NODE_UNREACHABLE, ExitCode.UNAVAILABLE)
    assert f"node 1 of 2 got no answer from 127.0.0.1:{place.port}" in ended.value.message


@dataclass
class FirstSays:
    """A world whose first rank has read `inputs`."""

    inputs: Any
    nodes: int = 2

    def copy_object(self, _: Any) -> Any:
        return self.inputs


def test_pods_that_have_read_other_inputs_do_not_train_together() -> None:
    mine = {"model": "a", "rows": 29}
    assert share_rows(FirstSays(mine), os, mine) is os  # type: ignore[arg-type]
    with pytest.raises(TrainerError, match="other inputs than the first one: rows \\(29 and 30\\)"):
        share_rows(FirstSays(mine | {"rows": 30}), os, mine)  # type: ignore[arg-type]
