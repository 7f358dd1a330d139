"""One platform for the whole suite (cluster, S3, node, operator installed by helm), and small jobs to run on it."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_devcluster.inputs import put_inputs
from finetune_devcluster.platform import CHECKOUT, Platform

ROWS = 48

Job = dict[str, Any]


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    work = tmp_path_factory.mktemp("inputs")
    with Platform.start() as running:
        put_inputs(running.store, work, rows=ROWS)
        yield running


@pytest.fixture(scope="session")
def job_namespace(platform: Platform) -> str:
    return platform.create_namespace("team-e2e")


@pytest.fixture
def small_job(platform: Platform, job_namespace: str) -> Callable[..., Job]:
    """Builder: the demo's sample, shortened to a few steps and without preflight; keyword arguments replace whole
    sections' fields."""
    sample = yaml.safe_load(Path(CHECKOUT / "crds/samples/cpu-tiny.yaml").read_text())

    def build(name: str, **sections: dict[str, Any]) -> Job:
        job: Job = copy.deepcopy(sample)
        job["metadata"] = {"name": name, "namespace": job_namespace}
        job["spec"]["output"]["s3"]["endpointURL"] = platform.store.endpoint_url
        job["spec"]["model"]["maxSequenceLength"] = 128
        job["spec"]["training"] = {"maxSteps": 3, "batchSize": 1, "gradientAccumulation": 1}
        job["spec"]["export"] = {"merged": "None", "gguf": []}
        job["spec"]["runPolicy"]["preflight"] = "Skip"
        for section, fields in sections.items():
            job["spec"].setdefault(section, {}).update(fields)
        return job

    return build
