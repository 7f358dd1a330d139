"""An API server under the test's control, and a connection to it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from finetune_operator.cluster.connection import ApiConnection
from finetune_test_servers.fake_api_server import FakeApiServer


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeApiServer]:
    async with FakeApiServer.serve(tmp_path) as serving:
        yield serving


@pytest.fixture
async def connection(server: FakeApiServer) -> AsyncIterator[ApiConnection]:
    opened = await ApiConnection.open(server.service_account("first"))
    yield opened
    await opened.close()
