"""Keys of messages that nothing reads, flags that have no effect and calls that no tool declares are named once."""

from typing import Any

import pytest

from finetune_api.vocabulary import TrainOn
from finetune_trainer.data.layouts import Conversation
from finetune_trainer.preflight.judgements.messages import judge_messages
from finetune_trainer.preflight.tallies.messages import MessageTally

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TEMPLATE = "{{ message.content }}{{ message['mood'] }}"
KNOWN = ANSWER | {"name": "n", "reasoning_content": "r"}
SCHEMA = {"type": "object", "properties": {"city": {}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


def calling(name: str, **arguments: Any) -> dict[str, Any]:
    return ANSWER | {"tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


def tally(train_on: TrainOn, *messages: dict[str, Any], tools: list[Any] | None = None) -> MessageTally:
    found = MessageTally()
    for number in (1, 2):
        found.add(f"a:{number}", Conversation([*messages], tools), train_on)
    return found


RESPONSES, ALL = TrainOn.RESPONSES, TrainOn.ALL
MESSAGES: dict[str, tuple[MessageTally, list[str]]] = {
    "role and text": (tally(RESPONSES, USER, ANSWER), []),
    "keys with a meaning": (tally(RESPONSES, USER, KNOWN), []),
    "a key that the template reads": (tally(RESPONSES, USER, ANSWER | {"mood": 1}), []),
    "keys that nothing reads": (
        tally(RESPONSES, USER | {"id": 1}, ANSWER | {"mask": 0, "moo": 1}),
        ["nothing reads: 'id' in 2 rows (a:1, a:2); 'mask' in 2 rows", "'moo' in 2 rows", "weight: 0, loss: false"],
    ),
    "a question that is to be learned": (
        tally(RESPONSES, USER | {"train": True}, ANSWER),
        ["2 rows (a:1, a:2) have train on messages that are no answers", "spec.dataset.trainOn"],
    ),
    "a question that is not to be learned, and is not": (tally(RESPONSES, USER | {"loss": False}, ANSWER), []),
    "a question that is to be learned, and is": (tally(ALL, USER | {"loss": True}, ANSWER), []),
    "a question that is not to be learned, but is": (tally(ALL, USER | {"weight": 0}, ANSWER), ["have weight on"]),
    "a call with the tool's arguments": (tally(RESPONSES, USER, calling("weather", city=1), tools=TOOLS), []),
    "a call with another argument": (
        tally(RESPONSES, USER, calling("weather", city=1, day=2), tools=TOOLS),
        ["do not declare: weather.day (the first in 2 rows (a:1, a:2)): the model learns to make them"],
    ),
    "a call of another tool": (tally(RESPONSES, USER, calling("time"), tools=TOOLS), ["do not declare: time"]),
}


@pytest.mark.parametrize(("found", "said"), MESSAGES.values(), ids=MESSAGES)
def test_what_messages_say_besides_role_and_text_is_judged(found: MessageTally, said: list[str]) -> None:
    findings = list(judge_messages(found, TEMPLATE))
    assert len(findings) == bool(said)
    for finding in findings:
        assert (finding.severity, finding.location) == ("Warning", "spec.dataset.source")
        message = finding.message
        assert all(part in message for part in said), message


def test_thousands_of_keys_are_no_burden() -> None:
    found = MessageTally()
    for number in range(1000):
        found.add(f"a:{number}", Conversation([USER | {f"k{number}": 1}, ANSWER]), RESPONSES)
    (finding,) = judge_messages(found, "")
    assert len(found.keys) == 100
    assert "and 95 more" in finding.message
