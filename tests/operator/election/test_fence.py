"""A replica that does not lead sends no writes."""

from typing import Any

import pytest

from finetune_api.base import Json
from finetune_operator.cluster.cluster import Cluster, NamespacedName
from finetune_operator.cluster.server_clock import ServerClock
from finetune_operator.election.election import Election
from finetune_operator.election.fence import FencedConnection
from finetune_operator.election.record import LeaseRecord
from finetune_operator.errors import ApiUnavailableError

LEASE = LeaseRecord("a", "10.0.0.1:8443", 12, "", "", 0, "1")


class RecordingConnection:
    """Answers every request, and remembers it."""

    def __init__(self) -> None:
        self.verbs: list[str] = []
        self.clock = ServerClock()

    async def request(self, verb: str, path: str, body: Json | None = None, **_: Any) -> Json:
        self.verbs.append(verb)
        return {}


async def test_writes_end_with_the_leadership_and_reads_go_on() -> None:
    now, sent = 0.0, RecordingConnection()
    election = Election("a", "10.0.0.1:8443", lambda: now)
    cluster = Cluster(FencedConnection(sent, election))
    manifest = {"metadata": {"namespace": "team", "name": "x", "uid": "1", "resourceVersion": "1"}}
    writes = (cluster.create_job, cluster.create_config_map, cluster.create_event)

    election.won(LEASE, sent=0.0)
    for write in writes:
        await write(manifest)
    await cluster.patch_job(manifest, {})
    assert sent.verbs == ["POST", "POST", "POST", "PATCH"]

    now = 8.0  # as after a SIGSTOP: nobody has told the workers
    for write in writes:
        with pytest.raises(ApiUnavailableError, match="does not lead any more"):
            await write(manifest)
    with pytest.raises(ApiUnavailableError):
        await cluster.patch_job(manifest, {})
    await cluster.get_fine_tune_job(NamespacedName("team", "x"))
    assert sent.verbs == ["POST", "POST", "POST", "PATCH", "GET"]
