"""The operator's role, from which a test takes a right and gives it back."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from kubernetes import client

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.operator_process import ACCOUNT

WithoutRights = Callable[[str], AbstractContextManager[None]]


@pytest.fixture
def without_rights(dev_cluster: DevCluster) -> WithoutRights:
    """A block in which the operator has no right on one resource."""
    rbac: Any = client.RbacAuthorizationV1Api(dev_cluster.api_client())

    def replace(rules: list[Any]) -> None:
        role = rbac.read_cluster_role(ACCOUNT)
        role.rules = rules
        rbac.replace_cluster_role(ACCOUNT, role)

    @contextmanager
    def without(resource: str) -> Iterator[None]:
        whole = rbac.read_cluster_role(ACCOUNT).rules
        replace([rule for rule in whole if rule.resources != [resource]])
        try:
            yield
        finally:
            replace(whole)

    return without
