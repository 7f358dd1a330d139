"""A fault at every request with which a trainer publishes, one plan each, generated from an undisturbed publication.

The generator is that of the operator's fault suite (docs/fault-suite.md).
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from finetune_api.progress import Resolved
from finetune_api.vocabulary import ArtifactType
from finetune_test_operator.faults.plans import Plan, count_places, generate, sample
from finetune_test_servers.faulty_store import Fault, FaultyStore, Request
from finetune_test_servers.s3_server import S3Server
from finetune_trainer.artifacts.store import ArtifactStore, LocalArtifact, Provenance
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage import s3_upload
from finetune_trainer.storage.object_store import ignore_bytes

PROVENANCE = Provenance(Resolved(dataset_digest="d" * 64))
SAMPLE, SEED = 6, 16
PART = 5 << 20  # bytes, the least that S3 takes
Open = Callable[..., ArtifactStore]

PASSING = {"500": ("InternalError", 500), "503": ("SlowDown", 503)}
BREAKS = {"reset": "breaks_before", "reset-commit": "breaks_after"}
LASTING = {"403": ("AccessDenied", 403)}


def read_place(request: Request) -> str:
    """The kind of a request, without names and numbers."""
    kinds = {"manifest.json": "manifest", "partNumber": "part", "upload": "upload", "list-type": "keys"}
    return f"{request.method} {next((kind for part, kind in kinds.items() if part in request.path), 'object')}"


def faults_of(place: str) -> Iterable[str]:
    """Faults before S3; only content can be damaged."""
    damages = ("damage",) if place in ("PUT object", "PUT part") else ()
    return (*PASSING, *BREAKS, *LASTING, *damages)


def build_fault(plan: Plan) -> Fault:
    """The fault of a plan; whoever names it has found its request."""
    if plan.fault in BREAKS:
        return Fault("", "", **{BREAKS[plan.fault]: True})
    if plan.fault == "damage":
        return Fault("", "", damages=True)
    code, status = (PASSING | LASTING)[plan.fault]
    return Fault("", "", code=code, status=status)


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[LocalArtifact]:
    """One that is sent whole, and one of two parts."""
    monkeypatch.setattr(s3_upload.PartPlan, "part_bytes", lambda plan, size: PART)
    small, large = tmp_path / "small.gguf", tmp_path / "large.gguf"
    small.write_bytes(b"0123456789" * 1000)
    large.write_bytes(os.urandom(PART + 17))
    return [
        LocalArtifact(ArtifactType.GGUF, small, "gguf", "Q8_0"),
        LocalArtifact(ArtifactType.GGUF, large, "gguf", "F16"),
    ]


def _publish(store: ArtifactStore, artifacts: list[LocalArtifact]) -> None:
    """What a trainer does between its start and its end."""
    store.probe()
    if store.find_existing(lambda: None) is None:
        store.publish(artifacts, PROVENANCE, ignore_bytes)


def _run(faulty: FaultyStore, plan: Plan | None, work: Callable[[], None]) -> tuple[list[str], bool]:
    """Work under a plan; returns the places that were passed, and whether the fault came."""
    places: list[str] = []
    fired = False

    def find(request: Request) -> Fault | None:
        nonlocal fired
        places.append(read_place(request))
        if plan is None or fired or places[-1] != plan.place or places.count(plan.place) != plan.number:
            return None
        fired = True
        return build_fault(plan)

    faulty.plan = find
    try:
        work()
    finally:
        faulty.plan = lambda request: None
    return places, fired


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [SAMPLE, pytest.param(1000, marks=pytest.mark.faults)], ids=["sample", "all"])
def test_a_fault_at_any_request_never_leaves_half_a_result(
    open_attempt: Open,
    faulty: FaultyStore,
    s3_server: S3Server,
    bucket: str,
    artifacts: list[LocalArtifact],
    count: int,
) -> None:
    traces = [
        _run(faulty, None, lambda job=job: _publish(open_attempt(job=job), artifacts))[0]  # type: ignore[misc]
        for job in ("team/first", "team/second")
    ]
    plans = generate("publishes", map(count_places, traces), faults_of)
    assert len(plans) >= 40
    plans = sample(plans, count, SEED)
    came = sum(_try_plan(plan, number, open_attempt, faulty, artifacts) for number, plan in enumerate(plans))
    assert came >= 0.9 * len(plans), "the faults happen"
    assert s3_server.client().list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []


def _try_plan(plan: Plan, number: int, open_attempt: Open, faulty: FaultyStore, artifacts: list[LocalArtifact]) -> bool:
    job = f"team/job-{number}"
    store, fired, error = open_attempt(job=job), False, None
    try:
        _, fired = _run(faulty, plan, lambda: _publish(store, artifacts))
    except TrainerError as raised:
        fired, error = True, raised
    assert error is None or plan.fault not in (*PASSING, *BREAKS), f"{plan.name}: {error}"
    assert error is None or error.reason, plan.name
    assert error is not None or not fired or plan.fault not in LASTING or _manifest(store), plan.name
    _check_result(plan, store)

    # The next pod finds the result, or makes it; nothing of the first one is left beside it.
    later = open_attempt("attempt-2", job=job)
    _publish(later, artifacts)
    _check_result(plan, later)
    assert _manifest(later), plan.name
    assert len({key.split("/")[1] for key in later.object_store.keys("attempts/")}) == 1, plan.name
    return fired


def _manifest(store: ArtifactStore) -> bool:
    return "manifest.json" in list(store.object_store.keys(""))


def _check_result(plan: Plan, store: ArtifactStore) -> None:
    """Whatever a manifest names is there, byte by byte."""
    if not _manifest(store):
        return
    manifest = store.find_existing(lambda: None)
    assert manifest is not None, plan.name
    for artifact in manifest.artifacts:
        found = store.object_store.read(artifact.uri.partition(f"/{store.config.job.name}/")[2])
        assert found is not None, f"{plan.name}: {artifact.uri}"
        assert hashlib.sha256(found.data).hexdigest() == artifact.sha256, f"{plan.name}: {artifact.uri}"
