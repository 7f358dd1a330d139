"""Operators of a test's own, in its process, on the real API server."""

from collections.abc import AsyncIterator

import pytest

from finetune_operator.cluster.connection import ApiConnection
from finetune_test_operator.operator_process import OperatorProcess


@pytest.fixture
async def connection(operator_process: OperatorProcess) -> AsyncIterator[ApiConnection]:
    """A connection with the operator's rights, while the common operator does not run; who needs it starts it again."""
    operator_process.kill()
    connection = await ApiConnection.open(operator_process.service_account)
    yield connection
    await connection.close()
