"""Reports over real HTTPS, to a server that answers what the test says."""

import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from finetune_api.progress import ProgressReport
from finetune_api.run_config import ProgressTarget
from finetune_api.vocabulary import Stage
from finetune_test_servers.certificates import Authority
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.reporter import Reporter


@dataclass
class Operator:
    """`answers` come first, then 200."""

    url: str = ""
    ca_certificate: str = ""
    answers: list[int] = field(default_factory=list)
    reports: list[ProgressReport] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    delay: float = 0
    connections: int = 0
    reports_of_a_connection: int = 1000
    """After so many, the server closes a connection without a word, as it may in the moment of the next report."""

    def target(self) -> ProgressTarget:
        return ProgressTarget(url=self.url, ca_certificate=self.ca_certificate, interval_seconds=0.03)


class _Handler(BaseHTTPRequestHandler):
    operator: ClassVar[Operator]
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.operator.connections += 1
        self._left = self.operator.reports_of_a_connection

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._left -= 1
        if self._left < 0:
            self.close_connection = True
            return
        time.sleep(self.operator.delay)
        self.operator.reports.append(ProgressReport.model_validate_json(body))
        self.operator.tokens.append(self.headers["Authorization"])
        self.send_response(self.operator.answers.pop(0) if self.operator.answers else 200)
        self.send_header("Location", f"{self.operator.url}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.operator.tokens.append("redirected")
        self.send_response(200)
        self.end_headers()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def operator(certificates: Authority) -> Iterator[Operator]:
    state = Operator(ca_certificate=certificates.ca.certificate.read_text())
    pair = certificates.server("progress", "progress", ("127.0.0.1",))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"operator": state}))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pair.certificate, pair.key)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    state.url = f"https://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("token-canary-1\n")
    return path


def _wait(holds: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not true after {seconds} s"
        time.sleep(0.01)


def _started(progress: ProgressTracker, target: ProgressTarget, token: Path) -> Reporter:
    reporter = Reporter(progress, target, token)
    reporter.start()
    return reporter


def test_the_newest_state_arrives_with_the_token(operator: Operator, token: Path) -> None:
    progress = ProgressTracker()
    reporter = _started(progress, operator.target(), token)
    progress.stage(Stage.TRAINING)
    for step in range(1, 501):
        progress.update(step=step)
    reporter.close()
    assert operator.reports[-1].finetune.step == 500
    assert len(operator.reports) < 100
    assert set(operator.tokens) == {"Bearer token-canary-1"}
    sequences = [report.finetune.sequence for report in operator.reports]
    assert sequences == sorted(set(sequences))


def test_a_refused_report_is_repeated_with_the_newest_state(operator: Operator, token: Path) -> None:
    operator.answers = [503, 429, 500]
    progress = ProgressTracker()
    reporter = _started(progress, operator.target(), token)
    progress.update(step=1)
    _wait(lambda: len(operator.reports) == 2)
    progress.update(step=2)
    _wait(lambda: not operator.answers and len(operator.reports) >= 4)
    reporter.close()
    assert operator.reports[3].finetune.step == 2


def test_a_rotated_token_is_used_after_401(operator: Operator, token: Path) -> None:
    operator.answers = [401]
    progress = ProgressTracker()
    reporter = _started(progress, operator.target(), token)
    progress.update(step=1)
    _wait(lambda: len(operator.tokens) == 1)
    token.write_text("token-canary-2\n")
    _wait(lambda: operator.tokens[-1] == "Bearer token-canary-2")
    reporter.close()


def test_410_ends_reporting(operator: Operator, token: Path) -> None:
    operator.answers = [410]
    progress = ProgressTracker()
    reporter = _started(progress, operator.target(), token)
    progress.stage(Stage.TRAINING)
    _wait(lambda: len(operator.reports) == 1)
    progress.stage(Stage.SAVING)
    reporter.close()
    assert len(operator.reports) == 1


def test_a_slow_or_absent_operator_never_holds_up_training(operator: Operator, token: Path) -> None:
    operator.delay = 1.0
    for target in (operator.target(), operator.target().model_copy(update={"url": "https://127.0.0.1:9"})):
        progress = ProgressTracker()
        reporter = _started(progress, target, token)
        start = time.perf_counter()
        for step in range(1000):
            progress.update(step=step)
        progress.stage(Stage.SAVING)
        assert time.perf_counter() - start < 0.5
        start = time.perf_counter()
        reporter.close(timeout=0.2)
        assert time.perf_counter() - start < 0.5


def test_a_redirect_is_not_followed(operator: Operator, token: Path) -> None:
    operator.answers = [302]
    progress = ProgressTracker()
    reporter = _started(progress, operator.target(), token)
    progress.update(step=1)
    _wait(lambda: len(operator.reports) >= 2)
    reporter.close()
    assert "redirected" not in operator.tokens


def test_a_server_of_another_authority_gets_no_token(
    operator: Operator, token: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Authority.create(tmp_path / "other").ca.certificate.read_text()
    progress = ProgressTracker()
    with caplog.at_level(logging.INFO):
        reporter = _started(progress, operator.target().model_copy(update={"ca_certificate": other}), token)
        progress.update(step=1)
        _wait(lambda: "not delivered" in caplog.text)
        reporter.close()
    assert operator.tokens == []
    assert "canary" not in caplog.text


def test_plain_http_is_refused(token: Path) -> None:
    with pytest.raises(ValueError, match="https only"):
        Reporter(ProgressTracker(), ProgressTarget(url="http://127.0.0.1:1"), token)


def test_reports_share_a_connection(operator: Operator, token: Path) -> None:
    progress = ProgressTracker()
    reporter = _started(progress, operator.target(), token)
    for step in range(1, 6):
        progress.update(step=step)
        _wait(lambda step=step: bool(operator.reports) and operator.reports[-1].finetune.step == step)
    reporter.close()
    assert operator.connections == 1


def test_a_report_on_a_connection_that_was_just_closed_is_sent_again_at_once(
    operator: Operator, token: Path, caplog: pytest.LogCaptureFixture
) -> None:
    operator.reports_of_a_connection = 2
    progress = ProgressTracker()
    with caplog.at_level(logging.INFO):
        reporter = _started(progress, operator.target(), token)
        for step in range(1, 6):
            progress.update(step=step)
            _wait(lambda step=step: bool(operator.reports) and operator.reports[-1].finetune.step == step)
        reporter.close()
    assert operator.connections >= 3
    assert "not delivered" not in caplog.text


@pytest.mark.parametrize("heartbeat", [None, 0.2])
def test_a_trainer_that_does_nothing_reports_all_the_same(
    operator: Operator, token: Path, heartbeat: float | None
) -> None:
    """Silence then means that its process is frozen."""
    reporter = Reporter(ProgressTracker(), operator.target(), token, heartbeat)
    reporter.start()
    time.sleep(1.1)
    assert (len(operator.reports) >= 4) == (heartbeat is not None)
    assert len(operator.reports) <= 10
    reporter.close()
