"""The place of this pod among those of a run on several nodes. Knows no PyTorch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One of `nodes` pods of a run."""

    index: int
    """The pod's completion index in its Job; the pod of index 0 leads: it alone reports, stores and publishes."""

    nodes: int
    host: str
    """Name of the leading pod."""

    port: int
    """TCP port at which the leading pod keeps the store."""

    @classmethod
    def parse(cls, index: int, nodes: int, rendezvous: str) -> "Place":
        """Reads the address as the pod's environment has it: HOST:PORT."""
        host, _, port = rendezvous.rpartition(":")
        return cls(index, nodes, host, int(port))

    @property
    def leads(self) -> bool:
        """True for the pod that reports, stores and publishes."""
        return self.index == 0

    def __str__(self) -> str:
        return f"node {self.index} of {self.nodes}"
