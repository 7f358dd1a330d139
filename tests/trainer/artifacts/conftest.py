"""A bucket for each test, a proxy that can misbehave, and jobs that write there."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.run_config import JobIdentity, RunConfig
from finetune_api.spec import FineTuneJobSpec
from finetune_devcluster.faulty_store import FaultyStore
from finetune_devcluster.object_store import ObjectStore
from finetune_trainer.artifacts.store import ArtifactStore, open_store

_numbers = itertools.count(1)
MakeConfig = Callable[..., RunConfig]
OpenStore = Callable[..., ArtifactStore]


@pytest.fixture
def bucket(object_store: ObjectStore) -> str:
    name = f"artifacts-{next(_numbers)}"
    object_store.create_bucket(name)
    return name


@pytest.fixture
def faulty(object_store: ObjectStore) -> Iterator[FaultyStore]:
    with FaultyStore.start(object_store) as started:
        yield started


@pytest.fixture
def credentials(object_store: ObjectStore, tmp_path: Path) -> Path:
    """A mounted Secret."""
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "AWS_ACCESS_KEY_ID").write_text(object_store.access_key)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(object_store.secret_key)
    return folder


@pytest.fixture
def make_config(bucket: str, faulty: FaultyStore) -> MakeConfig:
    def make(*, uid: str = "uid-1", steps: int = 5, **s3: Any) -> RunConfig:
        spec = {
            "model": {"source": "s3://models/tiny/"},
            "dataset": {"source": "s3://models/chat.jsonl"},
            "training": {"maxSteps": steps},
            "output": {"s3": {"bucket": bucket, "prefix": "out", "endpointURL": faulty.endpoint_url, **s3}},
            "runPolicy": {"checkpointsToKeep": 2},
        }
        identity = JobIdentity(namespace="team", name="job", uid=uid)
        return RunConfig.from_spec(identity, FineTuneJobSpec.model_validate(spec), None)

    return make


@pytest.fixture
def open_attempt(make_config: MakeConfig, credentials: Path) -> Iterator[OpenStore]:
    """Opens the store of an attempt, in S3 unless a folder is given."""
    opened: list[ArtifactStore] = []

    def open_it(attempt: str = "attempt-1", folder: Path | None = None, **changes: Any) -> ArtifactStore:
        opened.append(open_store(make_config(**changes), attempt, credentials, folder))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()
