"""The line in memory: who is looked at when a job frees its GPUs."""

from finetune_operator.cluster.cluster import NamespacedName
from finetune_operator.gpu_line import GONE_SECONDS, GpuLine
from finetune_operator.observe.snapshot import GpuUse, GpuUser, Snapshot
from finetune_test_operator.snapshot_builder import METADATA, a_snapshot, a_spec, at, decision_about

SPEC = a_spec(resources={"gpus": 1}, runPolicy={"preflight": "Skip"})
FULL = GpuUse(1, (GpuUser("first", 1),))


def _see(line: GpuLine, name: str, namespace: str = "team", created: float = 0, use: GpuUse | None = None) -> None:
    """One look: with `use` at a job that wants to start, without at one whose trainer runs."""
    metadata = METADATA.model_copy(
        update={"name": name, "uid": f"{namespace}/{name}", "creation_timestamp": at(created)}
    )
    snapshot: Snapshot = a_snapshot(SPEC, metadata=metadata) if use is None else a_snapshot(SPEC, job=None, gpu_use=use)
    line.note(NamespacedName(namespace, name), snapshot.__class__(**vars(snapshot) | {"metadata": metadata}),
              decision_about(snapshot))  # fmt: skip


def test_the_first_ten_of_the_namespace_are_woken_when_a_job_is_gone() -> None:
    line = GpuLine()
    _see(line, "first")
    for number in range(12):
        _see(line, f"waits-{number}", created=100 - number, use=FULL)
    _see(line, "waits", "other-team", use=FULL)
    assert line.take_woken() == {}

    line.forget("team/first")
    expected = {NamespacedName("team", f"waits-{number}"): GONE_SECONDS for number in range(2, 12)}
    assert line.take_woken() == expected
    assert line.take_woken() == {}


def test_a_job_that_starts_has_the_next_ones_looked_at() -> None:
    line = GpuLine()
    _see(line, "first", use=FULL)
    _see(line, "second", created=1, use=FULL)
    _see(line, "second", created=1, use=FULL)
    assert line.take_woken() == {}
    _see(line, "first")
    assert line.take_woken() == {NamespacedName("team", "second"): 0}
