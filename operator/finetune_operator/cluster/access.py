"""Rights of the operator's service account: every resource and verb that `cluster.py` and kopf's watches use.

`make generate` writes the chart's role from these rules, and the tests run the operator under them. There is no rule
for secrets, pods/log or pods/exec.
"""

from dataclasses import dataclass

from finetune_api import GROUP, PLURAL
from finetune_operator.desired.names import LEASE_NAME


@dataclass(frozen=True)
class Rule:
    """Verbs that are allowed on one resource, and the reason."""

    group: str
    """API group; empty for the core group."""

    resource: str
    verbs: tuple[str, ...]
    reason: str
    names: tuple[str, ...] = ()
    """The only objects that the rule is about; empty for all of them."""

    def to_wire(self) -> dict[str, list[str]]:
        """Returns the rule as an entry of a Role's `rules`."""
        entry = {"apiGroups": [self.group], "resources": [self.resource], "verbs": list(self.verbs)}
        return entry | ({"resourceNames": list(self.names)} if self.names else {})


RULES = (
    Rule(GROUP, PLURAL, ("get", "list", "watch"), "Jobs are read and watched, never changed."),
    Rule(GROUP, f"{PLURAL}/status", ("patch",), "The status is written with server-side apply."),
    Rule(
        GROUP,
        f"{PLURAL}/finalizers",
        ("update",),
        "Children name their job as an owner that blocks deletion; some API servers require this for it.",
    ),
    Rule(
        "batch",
        "jobs",
        ("get", "list", "watch", "create", "patch"),
        "Preflight and training are Jobs. Their suspension, deadline and ttl are patched.",
    ),
    Rule("", "configmaps", ("get", "create"), "An immutable ConfigMap carries the resolved job to its pods."),
    Rule("", "services", ("get", "create"), "Pods of a job on several nodes find each other by a headless Service."),
    Rule(
        "networking.k8s.io",
        "networkpolicies",
        ("get", "create"),
        "Pods of a job on several nodes are reached by each other only.",
    ),
    Rule("", "pods", ("get", "list", "watch"), "Exit codes and termination messages are read from pods."),
    Rule("", "pods/eviction", ("create",), "A trainer that has fallen silent is evicted, so that another one goes on."),
    Rule(
        "",
        "events",
        ("list", "create"),
        "Each transition is posted as an Event; Events of a stuck pod name the reason.",
    ),
)
"""Rules in the namespaces that the operator serves."""

QUEUE_RULES = (
    Rule(
        "kueue.x-k8s.io",
        "workloads",
        ("list", "watch", "patch"),
        "What a queue says of a job stands in its Workload, by which it is suspended too.",
    ),
    Rule("kueue.x-k8s.io", "localqueues", ("get",), "A queue that does not exist is reported before anything runs."),
    Rule("visibility.kueue.x-k8s.io", "localqueues/pendingworkloads", ("get",), "Jobs show their place in the line."),
)
"""Further rules in the namespaces that the operator serves, if the chart's value `kueue.enabled` is true."""

JOB_SET_RULES = (
    Rule(
        "jobset.x-k8s.io",
        "jobsets",
        ("get", "create", "patch"),
        "A JobSet makes the Job of a job that asks for one. Its suspension and ttl are patched.",
    ),
)
"""Further rules in the namespaces that the operator serves, if the chart's value `jobSets.enabled` is true."""

OWN_RULES = (
    Rule(
        "coordination.k8s.io",
        "leases",
        ("get", "update"),
        "The Lease says which replica leads.",
        names=(LEASE_NAME,),
    ),
    Rule("coordination.k8s.io", "leases", ("create",), "Kubernetes cannot restrict creation to a name."),
)
"""Rules in the operator's own namespace."""

AUTHORITY_NAME = "finetune-operator-authority"
AUTHORITY_RULES = (
    Rule(
        "", "configmaps", ("patch",), "The progress server's authority is shown to Prometheus.", names=(AUTHORITY_NAME,)
    ),
)
"""Further rules in the operator's own namespace, where it makes the progress server's certificate itself."""

CLUSTER_RULES = (
    Rule(
        "authentication.k8s.io",
        "tokenreviews",
        ("create",),
        "The API server says which pod a progress report's token belongs to, and whose token reads metrics.",
    ),
    Rule(
        "authorization.k8s.io",
        "subjectaccessreviews",
        ("create",),
        "The API server says who may read metrics.",
    ),
)
"""Rules for resources that exist for the whole cluster only."""
