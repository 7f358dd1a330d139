"""Real parts that the whole suite shares: one control plane, one S3 server, a fresh namespace for each test."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Triton decides at its import whether kernels are interpreted; without a GPU they are, so their tests run anywhere.
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

from finetune_trainer.cli.machine import let_gpu_memory_grow

let_gpu_memory_grow()

if TYPE_CHECKING:
    from finetune_devcluster.cluster import DevCluster
    from finetune_test_servers.s3_server import S3Server

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked `gpu` is skipped where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch  # these tests' own modules have imported it

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def dev_cluster() -> "Iterator[DevCluster]":
    """A real control plane without nodes."""
    from finetune_devcluster.cluster import DevCluster  # machines with a GPU need not have a cluster's packages

    with DevCluster.start() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def s3_server() -> "Iterator[S3Server]":
    """A real S3 server; each test makes its own bucket."""
    from finetune_test_servers.s3_server import S3Server

    with S3Server.start() as store:
        yield store


@pytest.fixture
def namespace(dev_cluster: "DevCluster") -> Iterator[str]:
    """A namespace of the test's own; it goes with the test, so that no operator of another test works on its jobs."""
    from kubernetes import client

    name = f"test-{next(_numbers)}"
    core: Any = client.CoreV1Api(dev_cluster.api_client())
    core.create_namespace({"metadata": {"name": name}})
    yield name
    core.delete_namespace(name)
