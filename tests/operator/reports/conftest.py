"""A reporter beside the operator, and a progress server without one."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.report_server import Server, serving
from finetune_test_operator.reporter import Reporter


@pytest.fixture
def reporter(operator: OperatorProcess, jobs: Any) -> Reporter:
    return Reporter(operator, jobs)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(tmp_path) as server:
        yield server
