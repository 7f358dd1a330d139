"""Benches start operators of their own, in place of the one that the other tests share."""

import pytest

from finetune_test_operator.operator_process import OperatorProcess


@pytest.fixture
def no_other_operator(operator_process: OperatorProcess) -> None:
    """The common operator does not run; a test that needs it starts it again."""
    operator_process.kill()
