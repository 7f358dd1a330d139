"""The end of a trainer's container, and the outcome that it left as its last words."""

from dataclasses import dataclass
from datetime import datetime
from typing import Self

from pydantic import ValidationError

from finetune_api.base import Json
from finetune_api.outcome import COMPRESSED_PREFIX, Outcome


def parse_time(text: str | None) -> datetime | None:
    """Reads a Kubernetes time, which is in UTC."""
    return datetime.fromisoformat(text) if text else None


@dataclass(frozen=True)
class Termination:
    """End of the trainer's container."""

    exit_code: int
    reason: str
    started: datetime | None
    finished: datetime | None
    message: str

    @classmethod
    def parse(cls, state: Json) -> Self:
        """Reads the `terminated` state of a container."""
        return cls(
            exit_code=int(state["exitCode"]),
            reason=state.get("reason", ""),
            started=parse_time(state.get("startedAt")),
            finished=parse_time(state.get("finishedAt")),
            message=state.get("message", ""),
        )

    def outcome(self) -> Outcome | None:
        """Outcome in the termination message; None if the trainer could write none, or something else wrote the
        message."""
        # The kubelet writes messages of its own, for example when a container cannot start.
        try:
            return Outcome.decode(self.message)
        except ValueError:
            return None

    def outcome_fault(self) -> str | None:
        """Returns why an outcome in the termination message cannot be used; None if it can, or if there is none."""
        if not self.message.startswith(("{", COMPRESSED_PREFIX)):
            return None
        try:
            Outcome.decode(self.message)
        except ValidationError as error:
            found = error.errors()[0]
            return f"{'.'.join(map(str, found['loc'])) or 'the message'}: {found['msg']}"
        except ValueError as error:
            return str(error)
        return None
