"""The processes of one pod among those of the whole run, and the store at which all of them meet."""

from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from finetune_trainer.distributed.nodes.meeting import LOCALHOST, Meeting


@dataclass(frozen=True)
class Group:
    """`local` processes of this pod, in a run whose every pod has as many."""

    local: int
    meeting: Meeting | None = None
    """The other pods; None in a run on one node."""

    @property
    def nodes(self) -> int:
        """Number of pods."""
        return self.meeting.place.nodes if self.meeting else 1

    @property
    def size(self) -> int:
        """Processes of the whole run."""
        return self.local * self.nodes

    @property
    def first(self) -> int:
        """Rank of this pod's first process."""
        return self.meeting.place.index * self.local if self.meeting else 0

    @property
    def leads(self) -> bool:
        """True on the pod of rank 0."""
        return self.first == 0

    @property
    def store(self) -> TCPStore | None:
        """The store that the first pod keeps; None where the pod is to open one for itself."""
        return self.meeting.store if self.meeting else None

    @property
    def address(self) -> str:
        """Address of the store for the processes of this pod."""
        return self.meeting.address if self.meeting else LOCALHOST

    def agrees_on(self, name: str, own: bool) -> bool:
        """True if any pod says so; waits for all of them. `name`: of the question, which is asked once."""
        if self.meeting is None:
            return own

        keys = [f"{name}/{index}" for index in range(self.nodes)]
        self.meeting.store.set(keys[self.meeting.place.index], str(int(own)))
        self.meeting.store.wait(keys, timedelta(days=365))
        return any(self.meeting.store.get(key) == b"1" for key in keys)
