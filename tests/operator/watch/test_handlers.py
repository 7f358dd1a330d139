"""Settings and handlers of kopf: it is patient, writes nothing, and hands every change to the queue."""

import itertools
from typing import Any

import kopf
import pytest

from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_operator.watch.handlers import MAX_BACKOFF_SECONDS, build_registry, build_settings


def test_kopf_never_gives_up_on_the_api_server() -> None:
    backoffs = build_settings().networking.error_backoffs
    assert not isinstance(backoffs, float | int)
    first, second = (list(itertools.islice(backoffs, 200)) for _ in range(2))
    assert len(first) == len(second) == 200
    assert all(0 < delay <= MAX_BACKOFF_SECONDS for delay in first)
    assert sum(first) > 2000
    assert first != second, "jitter keeps operators from coming back all at once"


def test_kopf_writes_nothing_and_needs_no_more_rights() -> None:
    settings = build_settings()
    assert settings.posting.enabled is settings.posting.loggers is False
    assert settings.peering.standalone is True
    assert settings.scanning.disabled is True


def test_kopf_copies_no_object_to_compare_it() -> None:
    storage = build_settings().persistence.diffbase_storage
    body = kopf.Body({"spec": {"model": {}}, "metadata": {"annotations": {"a": "b"}}})
    assert storage.build(body=body) == {}
    assert storage.fetch(body=body) is None


def test_only_handlers_without_annotations_and_finalizers_are_registered() -> None:
    registry = build_registry(None, TerminatedPods(), None)  # type: ignore[arg-type]
    assert {type(handler).__name__ for handler in registry._watching.get_all_handlers()} == {"WatchingHandler"}
    assert len(registry._watching.get_all_handlers()) == 3
    for others in (registry._changing, registry._spawning, registry._indexing, registry._webhooks):
        assert not others.get_all_handlers()


class Triggers:
    """A controller that only notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.told.append(name)


EVENTS = {
    "a list's object": (None, ["trigger_list"] * 3),
    "a change": ("MODIFIED", ["trigger", "trigger_owner", "trigger_owner"]),
    "an end": ("DELETED", ["forget", "trigger_owner", "trigger_owner"]),
}


@pytest.mark.parametrize(("kind", "told"), EVENTS.values(), ids=EVENTS)
async def test_the_objects_of_a_list_cause_one_list_and_no_looks(kind: str | None, told: list[str]) -> None:
    controller = Triggers()
    registry = build_registry(controller, TerminatedPods(), None)  # type: ignore[arg-type]
    labels = {"finetune.dev/job-uid": "uid"}
    names = {"name": "bot", "namespace": "team", "uid": "uid", "resourceVersion": "1"}
    body = {"metadata": names | {"labels": labels}}
    for handler in registry._watching.get_all_handlers():
        handle: Any = handler.fn
        await handle(
            event={"type": kind, "object": body}, body=body, name="bot", namespace="team", uid="uid", labels=labels
        )
    assert controller.told == told
