"""Rights of the operator beside what it asked for, by the audit logs of the API servers that it ran against.

    FINETUNE_DEV_AUDIT_DIR=logs python -m pytest tests/operator -m cluster
    python -m finetune_test_operator.rights_audit logs

prints a line for each granted verb, and fails if one was never used, or if something was asked for that no rule grants.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from finetune_api import GROUP, PLURAL
from finetune_devcluster.audit import Request, read_requests
from finetune_operator.cluster.access import (
    AUTHORITY_RULES,
    CLUSTER_RULES,
    JOB_SET_RULES,
    OWN_RULES,
    QUEUE_RULES,
    RULES,
)
from finetune_test_operator.operator_process import ACCOUNT

HELM_TEST = f"{ACCOUNT}-test"
"""Account of `helm test`, which has a role of its own."""

DISCOVERY = ("/api", "/apis", "/version", "/openapi")
"""Paths that Kubernetes itself lets every account read (role system:discovery)."""


class Right(NamedTuple):
    """A verb on a resource."""

    group: str
    resource: str
    verb: str

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}{'.' if self.group else ''}{self.group}"


UNSEEN: Final = {
    Right(GROUP, f"{PLURAL}/finalizers", "update"): (
        "asked for by an admission plugin, not by a request: "
        "test_access.py::test_some_api_servers_ask_for_the_right_on_finalizers"
    ),
    Right("visibility.kueue.x-k8s.io", "localqueues/pendingworkloads", "get"): (
        "asked of Kueue's own server, which only `make kueue` starts: test_real_kueue.py"
    ),
    **{
        Right(
            "jobset.x-k8s.io", "jobsets", verb
        ): "JobSet's controller runs in `make kueue` only: test_real_job_sets.py"
        for verb in ("get", "create", "patch")
    },
}
"""Rights that no request shows, and the test that needs them."""


@dataclass(frozen=True)
class Audit:
    """Requests of the operator, counted by right."""

    whole_cluster: Counter[Right]
    """Allowed by a ClusterRoleBinding."""

    namespaced: Counter[Right]
    """Allowed by a RoleBinding."""

    refused: Counter[Right]
    undocumented: Counter[Right]
    """Asked for, allowed or not, although no rule is about it."""

    @classmethod
    def of(cls, requests: Iterable[Request]) -> "Audit":
        """Counts the requests of the operator's accounts."""
        audit = cls(Counter(), Counter(), Counter(), Counter())
        for request in requests:
            account = request.user.rsplit(":", 1)[-1]
            if account.startswith(ACCOUNT) and account != HELM_TEST:
                audit._count(request)
        return audit

    @property
    def unused(self) -> list[Right]:
        """Rights that are granted and never used."""
        used = {*self.whole_cluster, *self.namespaced, *UNSEEN}
        return sorted(right for right in granted() if right not in used)

    def _count(self, request: Request) -> None:
        if not request.resource:
            if not request.path.startswith(DISCOVERY):
                self.undocumented[Right("", request.path, request.verb)] += 1
            return

        right = Right(request.group, request.resource, request.verb)
        if right not in granted():
            self.undocumented[right] += 1
        elif not request.is_allowed:
            self.refused[right] += 1  # a test took the right away
        elif "ClusterRoleBinding" in request.grant:
            self.whole_cluster[right] += 1
        else:
            self.namespaced[right] += 1


def granted() -> dict[Right, str]:
    """Returns every right that the rules grant, with the reason of its rule."""
    rules = (*RULES, *QUEUE_RULES, *JOB_SET_RULES, *OWN_RULES, *AUTHORITY_RULES, *CLUSTER_RULES)
    return {Right(rule.group, rule.resource, verb): rule.reason for rule in rules for verb in rule.verbs}


def main(folder: Path) -> int:
    """Print the table; returns 1 if rights and requests differ."""
    logs = sorted(folder.glob("*.jsonl"))
    audit = Audit.of(read_requests(*logs))

    print(f"{len(logs)} API servers. Requests allowed by a ClusterRole, by a Role, and refused by a test:\n")
    for right, reason in granted().items():
        counts = [counter[right] for counter in (audit.whole_cluster, audit.namespaced, audit.refused)]
        note = UNSEEN.get(right) or ("NEVER USED" if right in audit.unused else reason)
        print(f"{right!s:45}{counts[0]:8}{counts[1]:8}{counts[2]:8}  {note}")

    for right, count in sorted(audit.undocumented.items()):
        print(f"{right!s:45}{count:8}  NOT GRANTED BY ANY RULE")
    secrets = sum(count for right, count in audit.undocumented.items() if "secrets" in right.resource)
    unused, undocumented = len(audit.unused), len(audit.undocumented)
    print(
        f"\n{unused} granted and never used, {undocumented} asked for and not granted, {secrets} requests for secrets"
    )
    return 1 if audit.unused or audit.undocumented or not logs else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
