"""`helm test`, as a user runs it: in the operator's own image, under an account of its own."""

import pytest

from finetune_devcluster.platform import SYSTEM_NAMESPACE, Platform

pytestmark = [pytest.mark.e2e, pytest.mark.cluster]


def test_helm_test_passes_and_leaves_nothing(platform: Platform) -> None:
    where = ("--namespace", SYSTEM_NAMESPACE)
    done = platform.cluster.helm("test", "finetune-operator", *where, "--timeout", "90s", check=False)
    logs = platform.cluster.kubectl("logs", "finetune-operator-test", "-n", SYSTEM_NAMESPACE, check=False)
    assert done.returncode == 0, f"{done.stderr}\n{logs.stdout}"
    assert "Phase:          Succeeded" in done.stdout

    left = platform.cluster.kubectl("get", "pods,serviceaccounts,roles,rolebindings", *where, "-o", "name").stdout
    assert "finetune-operator-test" not in left
