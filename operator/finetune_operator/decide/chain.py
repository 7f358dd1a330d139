"""A chain of rules: the first one that applies decides.

A rule is a pure function that looks at a snapshot and one of its runs, and returns a decision or None. Its name is the
finding that it looks for, such as `trainer_succeeded`.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from finetune_operator.decide.decision import Decision
from finetune_operator.desired.installation import Installation
from finetune_operator.observe.snapshot import AnySnapshot, ChildRun

S = TypeVar("S", bound=AnySnapshot)

Rule = Callable[[S, ChildRun, Installation], Decision | None]
LastRule = Callable[[S, ChildRun, Installation], Decision]


class Chain(Generic[S]):
    """Rules in order, and a last one that always decides."""

    def __init__(self, *rules: Rule[S], otherwise: LastRule[S]) -> None:
        self.rules = rules
        self.otherwise = otherwise

    def decide(self, snapshot: S, run: ChildRun, installation: Installation) -> Decision:
        """Returns the decision of the first rule that applies."""
        for rule in self.rules:
            decision = rule(snapshot, run, installation)
            if decision is not None:
                return decision

        return self.otherwise(snapshot, run, installation)
