"""A status under a CRD that is older than the operator: what it declares is written, and the rest is named once."""

import logging

import pytest

from finetune_api.base import Json
from finetune_operator.cluster.connection import ApiConnection
from finetune_operator.cluster.status_writer import StatusWriter, find_undeclared, leave_out
from finetune_operator.errors import ApiUnavailableError
from finetune_test_servers.fake_api_server import FakeApiServer

# As kube-apiserver 1.36 words it: one field, and several.
ONE = (
    "failed to create typed patch object (team/job; finetune.dev/v1alpha1, Kind=FineTuneJob): "
    ".status.resolved.baseBytesPerProcess: field not declared in schema"
)
SEVERAL = (
    "failed to create typed patch object (team/job; finetune.dev/v1alpha1, Kind=FineTuneJob): errors:\n"
    "  .status.energy: field not declared in schema\n"
    '  .status.stages[name="Training"].watts: field not declared in schema\n'
    "  .status.attempts[0].rank: field not declared in schema"
)
BODY: Json = {
    "metadata": {"name": "job", "resourceVersion": "7"},
    "status": {
        "energy": 3,
        "attempts": [{"pod": "a", "rank": 0}, {"pod": "b", "rank": 1}],
        "resolved": {"worldSize": 2, "baseBytesPerProcess": 9},
    },
}


class OlderServer:
    """Stands in for an API server: refuses what its CRD lacks, a field at a time, and stores the rest."""

    def __init__(self, *messages: str) -> None:
        self.messages, self.bodies = list(messages), list[Json]()

    async def request(
        self, verb: str, path: str, body: Json | None = None, *, query: dict[str, str] | None, content_type: str
    ) -> Json:
        assert body is not None
        self.bodies.append(body)
        if self.messages:
            raise ApiUnavailableError(f"{verb} {path}: 500: {self.messages.pop(0)}")
        return body


def test_the_fields_of_a_refusal_are_found() -> None:
    assert find_undeclared(ONE) == {("status", "resolved", "baseBytesPerProcess")}
    assert find_undeclared(SEVERAL) == {
        ("status", "energy"),
        ("status", "stages", "watts"),
        ("status", "attempts", "rank"),
    }
    assert find_undeclared("500: etcdserver: request timed out") == set()


def test_fields_are_left_out_of_every_item() -> None:
    rest = leave_out(BODY, find_undeclared(SEVERAL))
    assert rest["status"] == {"attempts": [{"pod": "a"}, {"pod": "b"}], "resolved": BODY["status"]["resolved"]}
    assert BODY["status"]["energy"] == 3, "the status itself stays as it was"


async def test_the_rest_is_written_and_the_field_named_once(caplog: pytest.LogCaptureFixture) -> None:
    server = OlderServer(ONE, SEVERAL)
    writer = StatusWriter(server)
    stored = await writer.apply("/jobs/job/status", BODY)
    assert stored["status"] == {"attempts": [{"pod": "a"}, {"pod": "b"}], "resolved": {"worldSize": 2}}
    assert [each["metadata"]["resourceVersion"] for each in server.bodies] == ["7", "7", "7"]

    server.messages = [ONE]
    await writer.apply("/jobs/job/status", BODY)
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert sum("lacks status.resolved.baseBytesPerProcess" in each for each in warnings) == 1
    assert len(warnings) == 4


async def test_a_server_in_trouble_stays_an_outage(server: FakeApiServer, connection: ApiConnection) -> None:
    server.status, server.text = 500, '{"kind": "Status", "message": "etcdserver: request timed out"}'
    with pytest.raises(ApiUnavailableError, match="request timed out"):
        await StatusWriter(connection).apply("/jobs/job/status", BODY)
    assert len(server.requests) == 1


async def test_a_refusal_of_a_field_that_was_not_sent_ends(caplog: pytest.LogCaptureFixture) -> None:
    server = OlderServer(*["x: .status.nothing: field not declared in schema"] * 3)
    with pytest.raises(ApiUnavailableError):
        await StatusWriter(server).apply("/jobs/job/status", BODY)
    assert len(server.bodies) == 1
    assert not caplog.records
