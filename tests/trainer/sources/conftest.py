"""A hub for each test."""

from collections.abc import Iterator

import pytest

from finetune_test_servers.hub import Hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub.start() as started:
        yield started
