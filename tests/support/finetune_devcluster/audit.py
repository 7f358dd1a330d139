"""Audit log of the API server: who asked for what, and whether the roles allowed it.

Only service accounts outside kube-system are logged, and only metadata: never a body, so never a secret.
`FINETUNE_DEV_AUDIT_DIR` names a folder that keeps the logs of every cluster; without it, they go with the cluster.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],  # a watch is an entry when it starts, and another one when it ends
    "rules": [
        {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},
        {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
        {"level": "None"},
    ],
}


@dataclass(frozen=True)
class Request:
    """A request to the API server."""

    user: str
    verb: str
    group: str
    resource: str
    """Plural, with the subresource behind a slash; empty for paths that are no resource."""

    namespace: str
    name: str
    path: str
    is_allowed: bool
    grant: str
    """Sentence of the authorizer that names the binding and the role; empty if nothing allowed the request."""

    @classmethod
    def parse(cls, event: dict[str, Any]) -> "Request":
        """Reads an entry of the log."""
        target, notes = event.get("objectRef") or {}, event.get("annotations") or {}
        parts = (target.get("resource", ""), target.get("subresource", ""))
        is_allowed = notes.get("authorization.k8s.io/decision") == "allow"

        return cls(
            user=event["user"]["username"],
            verb=event["verb"],
            group=target.get("apiGroup", ""),
            resource="/".join(part for part in parts if part),
            namespace=target.get("namespace", ""),
            name=target.get("name", ""),
            path=event["requestURI"].split("?")[0],
            is_allowed=is_allowed,
            grant=notes.get("authorization.k8s.io/reason", "") if is_allowed else "",
        )


def audit_log(folder: Path) -> Path:
    """Path of the log of the cluster with this folder."""
    kept = os.environ.get("FINETUNE_DEV_AUDIT_DIR")
    return Path(kept) / f"{folder.name}.jsonl" if kept else folder / "audit.jsonl"


def audit_flags(folder: Path) -> tuple[str, ...]:
    """Writes the policy; returns the API server's flags."""
    policy = folder / "audit-policy.json"
    policy.write_text(json.dumps(POLICY))
    return (f"--audit-policy-file={policy}", f"--audit-log-path={audit_log(folder)}", "--audit-log-maxsize=1000")


def read_requests(*logs: Path) -> Iterator[Request]:
    """Reads logs; a line that is still being written is left out."""
    for log in logs:
        with log.open(encoding="utf-8") as lines:
            yield from (Request.parse(json.loads(line)) for line in lines if line.endswith("\n"))
