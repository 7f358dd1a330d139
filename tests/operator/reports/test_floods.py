"""Floods against the progress server of a real operator, beside an honest trainer: nothing grows, nobody waits."""

import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune_api.progress import progress_path
from finetune_devcluster.cluster import DevCluster
from finetune_operator.reports.site import EXCHANGE_SECONDS
from finetune_operator.reports.visits import MAX_CONNECTIONS
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for
from finetune_test_operator.reporter import Reporter

pytestmark = pytest.mark.cluster
PEERS = [f"127.0.0.{number}" for number in range(2, 12)]
HEAD = f"POST {progress_path('x', 'y')} HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n".encode()
HALVES = (None, HEAD, HEAD + b"\r\n{")
"""What a connection sends: nothing, not even a TLS handshake; half of the headers; half of the body."""

MEMORY_OF_A_FLOOD = 150  # MiB: 256 connections of 0.3 to 0.6 MiB


@contextmanager
def half_sent(operator: OperatorProcess, count: int) -> Iterator[list[socket.socket]]:
    """Connections of many peers with half a request each."""
    with ExitStack() as stack:
        opened = []
        for number in range(count):
            sock = _open(operator, PEERS[number % len(PEERS)], HALVES[number % len(HALVES)])
            if sock is not None:
                stack.callback(sock.close)
                opened.append(sock)
        yield opened


def _open(operator: OperatorProcess, peer: str, request: bytes | None) -> socket.socket | None:
    """A connection from one peer; None if it was refused or dismissed at once."""
    try:
        plain = socket.create_connection(("127.0.0.1", operator.progress_port), 10, source_address=(peer, 0))
        if request is None:
            return plain
        sock = operator.tls().wrap_socket(plain, server_hostname="127.0.0.1")
        sock.sendall(request)
    except OSError:
        return None
    return sock


def is_closed(sock: socket.socket) -> bool:
    """True if the server has closed the connection."""
    sock.settimeout(0.01)
    try:
        while sock.recv(4096):
            pass
    except (TimeoutError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True
    return True


def memory(operator: OperatorProcess) -> int:
    """Resident memory of the operator in MiB."""
    status = Path(f"/proc/{operator.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) // 1024


def sockets(operator: OperatorProcess) -> int:
    """Open files of the operator, sockets among them."""
    return len(list(Path(f"/proc/{operator.pid}/fd").iterdir()))


def token_reviews(cluster: DevCluster) -> int:
    """TokenReviews that the API server has answered."""
    lines = cluster.kubectl("get", "--raw", "/metrics").stdout.splitlines()
    counted = [line for line in lines if line.startswith("apiserver_request_total") and "tokenreviews" in line]
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in counted)


@pytest.fixture
def honest(jobs: Any, kubelet: PlayedKubelet, reporter: Reporter) -> str:
    """Token of a job's running pod."""
    jobs.create("honest")
    pod = kubelet.wait_for_pod("honest")
    kubelet.run(pod)
    return reporter.own_token(pod, "honest")


def test_half_sent_requests_end_and_displace_nobody(operator: OperatorProcess, reporter: Reporter, honest: str) -> None:
    assert reporter.post("honest", honest, 1) == 202
    memory_before, sockets_before = memory(operator), sockets(operator)

    with half_sent(operator, 500) as opened:
        assert sockets(operator) - sockets_before <= MAX_CONNECTIONS + 10
        assert memory(operator) - memory_before < MEMORY_OF_A_FLOOD
        assert reporter.post("honest", honest, 2) == 202
        wait_for(lambda: all(map(is_closed, opened)), "every connection is closed", 4 * EXCHANGE_SECONDS)

    wait_for(lambda: sockets(operator) <= sockets_before + 10, "the operator has closed its sockets")
    assert reporter.post("honest", honest, 3) == 202


def test_a_forged_token_costs_one_review(
    dev_cluster: DevCluster, operator: OperatorProcess, reporter: Reporter, honest: str
) -> None:
    assert reporter.post("honest", honest, 1) == 202
    before = token_reviews(dev_cluster)

    assert {reporter.post("honest", "forged", number) for number in range(200)} == {401}
    assert reporter.post("honest", honest, 2) == 202
    # The refusal is remembered for 30 s; a slow machine may take longer for so many posts.
    assert 1 <= token_reviews(dev_cluster) - before <= 3


def test_an_honest_report_costs_one_request(
    dev_cluster: DevCluster, operator: OperatorProcess, reporter: Reporter, honest: str
) -> None:
    assert reporter.post("honest", honest, 1) == 202
    before = token_reviews(dev_cluster)
    assert [reporter.post("honest", honest, number) for number in range(2, 12)] == [202] * 10
    assert token_reviews(dev_cluster) == before
