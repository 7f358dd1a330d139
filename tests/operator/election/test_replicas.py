"""Two replicas on one real Lease: the leader stops, is killed, or is cut off from the API server.

Both reach the API server through proxies that record their writes. After each test the records are checked: nobody but
the holder of the Lease wrote, and every Job was created once.
"""

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from finetune_devcluster.cluster import DevCluster
from finetune_operator.desired.names import LEASE_NAME
from finetune_operator.election.election import LEASE_SECONDS, RENEW_DEADLINE_SECONDS
from finetune_test_operator.api_proxy import ApiProxy, ApiWrite
from finetune_test_operator.operator_process import NAMESPACE, OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for
from finetune_test_operator.reporter import Reporter

pytestmark = pytest.mark.cluster


@dataclass(frozen=True)
class Replica:
    """One replica, and its way to the API server."""

    process: OperatorProcess
    proxy: ApiProxy

    def start(self, *, follows: bool) -> None:
        self.process.start(api_port=self.proxy.port, follows=follows)


@pytest.fixture(scope="module")
def pair(
    dev_cluster: DevCluster, operator_process: OperatorProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Replica, Replica]]:
    """Two replicas, in place of the operator of all tests."""
    operator_process.kill()
    with ApiProxy.start(dev_cluster) as first_proxy, ApiProxy.start(dev_cluster) as second_proxy:
        first = OperatorProcess(dev_cluster, tmp_path_factory.mktemp("first"))
        second = OperatorProcess(dev_cluster, tmp_path_factory.mktemp("second"), beside=first)
        replicas = Replica(first, first_proxy), Replica(second, second_proxy)
        replicas[0].start(follows=False)
        replicas[1].start(follows=True)
        yield replicas
        first.kill()
        second.kill()


@pytest.fixture
def leader_first(pair: tuple[Replica, Replica]) -> Iterator[tuple[Replica, Replica]]:
    """The leader and the follower. Whoever has ended is started again, and the records are checked at the end."""
    for each in pair:
        if not each.process.is_running:
            each.start(follows=True)
        each.proxy.writes.clear()

    leader, follower = sorted(pair, key=lambda each: not each.process.is_leading)
    yield leader, follower
    check_writes(leader, follower)


def check_writes(*replicas: Replica) -> None:
    """Nobody but the holder of the Lease wrote, and no Job was created twice. The first replica held it at first."""
    writes = [(write, replica) for replica in replicas for write in replica.proxy.writes]
    holder, created = replicas[0], list[str]()
    for write, replica in sorted(writes, key=lambda each: each[0].time):
        if is_lease(write):
            holder = replica if write.status in (200, 201) and write.body["spec"]["holderIdentity"] else holder
        elif "tokenreviews" not in write.path:
            assert replica is holder, f"{write.verb} {write.path} by a replica that does not hold the Lease"
        if write.verb == "POST" and write.path.endswith("/jobs") and write.status == 201:
            created.append(write.path + write.body["metadata"]["name"])

    assert created
    assert len(set(created)) == len(created)


def is_lease(write: ApiWrite) -> bool:
    return write.path.endswith((f"/leases/{LEASE_NAME}", "/leases"))


def test_a_leader_that_stops_hands_over_in_less_than_two_seconds(
    leader_first: tuple[Replica, Replica], jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    leader, follower = leader_first
    jobs.create("handed")
    pod = kubelet.wait_for_pod("handed")
    kubelet.run(pod)
    jobs.wait_for_phase("handed", "Running")
    report = Reporter(follower.process, jobs)
    token = report.own_token(pod, "handed")
    assert report.post("handed", token, 1, step=1) == 202, "the follower passes it on"
    assert Reporter(leader.process, jobs).post("handed", token, 1, step=1) == 409, "the leader knows it"
    jobs.wait("handed", lambda s: s.get("progress", {}).get("step") == 1, "step 1", 5)

    began = time.monotonic()
    leader.process.signal(signal.SIGTERM)
    wait_for(lambda: follower.process.is_leading, "the follower leads")
    seconds = time.monotonic() - began
    print(f"handed over and ready after {seconds:.2f} s")
    assert seconds < 2
    assert leader.process.wait() == 0

    assert report.post("handed", token, 1, step=1) == 409, "the number is in the status"
    assert report.post("handed", token, 2, step=2) == 202
    jobs.wait("handed", lambda s: s["progress"]["step"] == 2, "step 2", 12)
    kubelet.end(pod, 0, outcomes.success.encode())
    jobs.wait_for_phase("handed", "Succeeded")
    assert report.post("handed", token, 3) == 410


def test_a_killed_leader_is_replaced_in_less_than_20_seconds(
    leader_first: tuple[Replica, Replica], jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    leader, follower = leader_first
    jobs.create("ending")
    jobs.create("training")
    ending, training = kubelet.wait_for_pod("ending"), kubelet.wait_for_pod("training")
    kubelet.run(ending)
    kubelet.run(training)
    jobs.wait_for_phase("ending", "Running")
    jobs.wait_for_phase("training", "Running")
    report = Reporter(follower.process, jobs)
    token = report.own_token(training, "training")
    assert report.post("training", token, 5, step=5) == 202
    jobs.wait("training", lambda s: s.get("progress", {}).get("step") == 5, "step 5", 5)

    began = time.monotonic()
    leader.process.kill()
    kubelet.end(ending, 0, outcomes.success.encode())
    jobs.create("new")
    assert report.post("training", token, 6, step=6) == 503, "the trainer keeps it"
    wait_for(lambda: follower.process.is_leading, "the follower leads", 30)
    seconds = time.monotonic() - began
    print(f"replaced and ready after {seconds:.2f} s")
    assert seconds < 20

    assert report.post("training", token, 5, step=5) == 409
    assert report.post("training", token, 6, step=6) == 202
    jobs.wait("training", lambda s: s["progress"]["step"] == 6, "step 6", 12)
    jobs.wait_for_phase("ending", "Succeeded")
    assert kubelet.wait_for_pod("new")


def test_a_leader_without_the_api_server_stops_before_another_begins(
    leader_first: tuple[Replica, Replica], jobs: Any, kubelet: PlayedKubelet
) -> None:
    leader, follower = leader_first
    jobs.create("cut-off")
    pod = kubelet.wait_for_pod("cut-off")
    jobs.wait_for_phase("cut-off", "Queued")

    # A status write is on its way when everything falls silent.
    leader.proxy.hold(lambda verb, path: path.endswith("cut-off/status"))
    kubelet.run(pod)
    wait_for(lambda: leader.proxy.held, "the write is under way")
    leader.proxy.hold()
    began = time.monotonic()

    wait_for(lambda: not leader.process.is_leading, "the leader stands down", 15)
    stopped = time.monotonic() - began
    held = [write for write in follower.proxy.writes if is_lease(write)]
    assert held == [], "the other replica has not begun"
    wait_for(lambda: follower.process.is_leading, "the follower leads", 30)
    print(f"stood down after {stopped:.2f} s, replaced after {time.monotonic() - began:.2f} s")
    assert stopped < RENEW_DEADLINE_SECONDS + 1 < LEASE_SECONDS
    jobs.wait_for_phase("cut-off", "Running")

    leader.proxy.mend()
    old = Reporter(leader.process, jobs)
    wait_for(lambda: old.post("cut-off", "forged", 1) == 401, "the old leader passes reports on")
    assert leader.process.is_running


def test_the_check_of_the_records_sees_a_write_without_the_lease() -> None:
    lease = ApiWrite(1.0, "PUT", f"/x/leases/{LEASE_NAME}", {"spec": {"holderIdentity": "b"}}, 200)
    create = ApiWrite(2.0, "POST", "/x/jobs", {"metadata": {"name": "job"}}, 201)

    def replica(*writes: ApiWrite) -> Replica:
        proxy = ApiProxy.__new__(ApiProxy)
        proxy.writes = list(writes)
        return Replica(None, proxy)  # type: ignore[arg-type]

    check_writes(replica(), replica(lease, create))
    with pytest.raises(AssertionError, match="does not hold the Lease"):
        check_writes(replica(create), replica(lease))
    with pytest.raises(AssertionError):
        check_writes(replica(), replica(lease, create, create))


def is_made_lease(write: ApiWrite) -> bool:
    """True for a Lease that was not there."""
    return is_lease(write) and write.verb == "POST" and write.status == 201


def test_a_lease_that_somebody_deletes_is_made_again_and_one_replica_leads(
    leader_first: tuple[Replica, Replica], jobs: Any, dev_cluster: DevCluster
) -> None:
    dev_cluster.kubectl("delete", "lease", "-n", NAMESPACE, LEASE_NAME)

    def leaders() -> list[Replica]:
        return [each for each in leader_first if each.process.is_leading]

    def makers() -> list[Replica]:
        return [each for each in leader_first if any(is_made_lease(write) for write in each.proxy.writes)]

    # Whoever held the one before leads until it looks again.
    wait_for(makers, "another Lease", 30)
    wait_for(lambda: leaders() == makers(), "that whoever made it leads alone", 30)
    jobs.create("after-the-lease")
    jobs.wait_for_phase("after-the-lease", "Queued", 30)
