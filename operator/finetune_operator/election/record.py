"""The Lease as this operator reads and writes it (pure).

Besides the holder it carries, in an annotation, the address at which the holder takes progress reports: whoever reads
who leads also learns where, in one read.
"""

from dataclasses import dataclass
from typing import Self

from finetune_api import GROUP
from finetune_api.base import Json
from finetune_operator.desired.names import LEASE_NAME

ADDRESS_ANNOTATION = f"{GROUP}/progress-address"


@dataclass(frozen=True)
class LeaseRecord:
    """One version of the Lease. Two records are equal only if nobody wrote in between."""

    holder: str
    """Identity of the replica that leads; empty: nobody does."""

    address: str
    """Host and port of the holder's progress server."""

    seconds: int
    """Time without a renewal after which others may take the Lease."""

    acquired: str
    renewed: str
    """Wall-clock times of the holder, for people: no decision reads them."""

    transitions: int
    version: str
    """The resourceVersion; empty if the Lease does not exist yet."""

    @classmethod
    def parse(cls, body: Json) -> Self:
        """Reads a Lease, whoever wrote it."""
        metadata, spec = body["metadata"], body.get("spec") or {}
        return cls(
            holder=spec.get("holderIdentity") or "",
            address=(metadata.get("annotations") or {}).get(ADDRESS_ANNOTATION, ""),
            seconds=spec.get("leaseDurationSeconds") or 0,
            acquired=spec.get("acquireTime") or "",
            renewed=spec.get("renewTime") or "",
            transitions=spec.get("leaseTransitions") or 0,
            version=metadata["resourceVersion"],
        )

    def to_wire(self, namespace: str, name: str = LEASE_NAME) -> Json:
        """Returns the object to create, or to replace the version that was read with."""
        metadata: Json = {"name": name, "namespace": namespace, "annotations": {ADDRESS_ANNOTATION: self.address}}
        if self.version:
            metadata["resourceVersion"] = self.version

        spec = {
            "holderIdentity": self.holder,
            "leaseDurationSeconds": self.seconds,
            "acquireTime": self.acquired,
            "renewTime": self.renewed,
            "leaseTransitions": self.transitions,
        }
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
