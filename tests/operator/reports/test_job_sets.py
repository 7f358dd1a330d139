"""Reports of pods whose Job a JobSet made: the chain of UIDs that leads to the job, and each way in which it breaks."""

from collections.abc import Callable

import pytest

from finetune_operator.desired.job_set import API_VERSION
from finetune_test_operator.report_server import JOB_UID, FakeCluster, Server, a_report, owner

SET_UID = "set-uid"


def _in_a_set(
    cluster: FakeCluster, api_version: str = API_VERSION, uid: str = SET_UID, job_uid: str | None = JOB_UID
) -> None:
    """Puts a JobSet with `uid`, which the FineTuneJob with `job_uid` owns, between the job and its Job."""
    assert cluster.child
    cluster.child["metadata"]["ownerReferences"] = owner("JobSet", "set", SET_UID, api_version)
    owners = owner("FineTuneJob", "bot", job_uid) if job_uid else []
    cluster.job_sets.job_set = {"metadata": {"name": "set", "uid": uid, "ownerReferences": owners}}


async def test_a_pod_whose_job_a_set_of_the_job_made_is_believed(server: Server) -> None:
    _in_a_set(server.cluster)
    assert await server.post(a_report()) == (202, "Accepted")
    assert server.store.newest(JOB_UID) is not None
    assert server.cluster.job_sets.asked == ["set"]


async def test_no_set_is_asked_for_where_the_job_owns_its_job_itself(server: Server) -> None:
    assert (await server.post(a_report()))[0] == 202
    assert server.cluster.job_sets.asked == []


def _set_gone(cluster: FakeCluster) -> None:
    _in_a_set(cluster)
    cluster.job_sets.job_set = None


def _set_hidden(cluster: FakeCluster) -> None:
    _in_a_set(cluster)
    cluster.job_sets.is_forbidden = True


FOREIGN: dict[str, Callable[[FakeCluster], None]] = {
    "a set of another FineTuneJob": lambda cluster: _in_a_set(cluster, job_uid="another-uid"),
    "a set that nobody owns": lambda cluster: _in_a_set(cluster, job_uid=None),
    "a set that was made again under its name": lambda cluster: _in_a_set(cluster, uid="another-uid"),
    "a set that is gone": _set_gone,
    "a set that may not be read": _set_hidden,
    "something else that is called JobSet": lambda cluster: _in_a_set(cluster, api_version="example.com/v1"),
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
async def test_a_set_that_does_not_lead_to_the_job_is_forbidden(
    server: Server, change: Callable[[FakeCluster], None]
) -> None:
    change(server.cluster)
    assert await server.post(a_report()) == (403, "Forbidden")
    assert server.store.newest(JOB_UID) is None
