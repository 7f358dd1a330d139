"""A chain asks its rules in order, and the last one always answers."""

from typing import Any

import pytest

from finetune_api.vocabulary import Phase
from finetune_operator.decide.chain import Chain
from finetune_operator.decide.decide import PREFLIGHT, TRAINING, UNREADABLE
from finetune_operator.decide.decision import Decision
from finetune_operator.observe.snapshot import Snapshot
from finetune_test_operator.snapshot_builder import INSTALLATION, a_snapshot

FAILED = Decision(Phase.FAILED, "Failed", "")
QUEUED = Decision(Phase.QUEUED, "Queued", "")


def _never(*_: object) -> None:
    return None


def _failed(*_: object) -> Decision:
    return FAILED


def _queued(*_: object) -> Decision:
    return QUEUED


CHAINS: dict[str, tuple[Chain[Snapshot], Decision]] = {
    "the first rule that applies wins": (Chain(_never, _failed, _queued, otherwise=_queued), FAILED),
    "no rule applies": (Chain(_never, _never, otherwise=_queued), QUEUED),
    "there is no rule": (Chain(otherwise=_queued), QUEUED),
}


@pytest.mark.parametrize(("chain", "decision"), CHAINS.values(), ids=CHAINS)
def test_who_decides(chain: Chain[Snapshot], decision: Decision) -> None:
    snapshot = a_snapshot()
    assert chain.decide(snapshot, snapshot.training, INSTALLATION) is decision


@pytest.mark.parametrize("chain", [TRAINING, PREFLIGHT, UNREADABLE], ids=["training", "preflight", "unreadable"])
def test_every_rule_says_what_it_finds(chain: Chain[Any]) -> None:
    for rule in (*chain.rules, chain.otherwise):
        assert rule.__doc__
        assert not rule.__name__.startswith("_")
