"""Where the trainer's connections lead: checked when they are opened, against real servers."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import get_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from finetune_api.failures import FailureReason
from finetune_api.spec.endpoints import EndpointPolicy
from finetune_test_servers.s3_server import S3Server
from finetune_trainer.errors import TrainerError
from finetune_trainer.sources.hub import restrict_hub
from finetune_trainer.storage.s3_faults import OUTPUT_REASONS, S3Fault
from finetune_trainer.storage.s3_session import S3Location, S3Session

POLICY = EndpointPolicy()
ON_THIS_MACHINE = EndpointPolicy(loopback=True)


class Redirector(BaseHTTPRequestHandler):
    """Answers every request with a redirect."""

    status: ClassVar[int] = 307
    target: ClassVar[str] = "http://169.254.169.254/latest/?X-Amz-Signature=secret"
    seen: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        self.seen.append(self.path)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Location", self.target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_PUT = do_GET  # noqa: N815 (names that http.server calls)


@pytest.fixture
def redirector() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Redirector)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    Redirector.seen.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def keys(s3_server: S3Server, tmp_path: Path) -> Path:
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text(s3_server.access_key)
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text(s3_server.secret_key)
    return tmp_path


def _session(url: str, keys: Path, policy: EndpointPolicy | None) -> S3Session:
    return S3Session("results", S3Location(url, None, policy), keys, OUTPUT_REASONS)


def _names(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Let the name the-store have these addresses at the first look-up, the second and so on."""
    real, asked, left = socket.getaddrinfo, [], list(answers)

    def look_up(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host != "the-store":
            return real(host, port, *arguments, **options)
        asked.append(host)
        addresses = left.pop(0) if len(left) > 1 else left[0]
        return [entry for address in addresses for entry in real(address, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_a_name_that_leads_to_metadata_is_refused(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _names(monkeypatch, ["8.8.8.8", "169.254.169.254"])
    with pytest.raises(S3Fault, match=r"the-store is not allowed .* 169\.254\.169\.254") as refusal:
        _session("http://the-store", keys, POLICY).call("head_bucket")
    assert refusal.value.reason is FailureReason.ENDPOINT_NOT_ALLOWED


def test_a_name_is_looked_up_once_for_a_connection(
    s3_server: S3Server, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.create_bucket("results")
    port = s3_server.endpoint_url.rpartition(":")[2]
    asked = _names(monkeypatch, ["127.0.0.1"], ["169.254.169.254"])
    _session(f"http://the-store:{port}", keys, ON_THIS_MACHINE).call("head_bucket")
    assert asked == ["the-store"]


def test_an_address_that_does_not_answer_gives_way_to_the_next(
    s3_server: S3Server, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.create_bucket("results")
    port = s3_server.endpoint_url.rpartition(":")[2]
    _names(monkeypatch, ["127.0.0.2", "127.0.0.1"])
    _session(f"http://the-store:{port}", keys, ON_THIS_MACHINE).call("head_bucket")


def test_an_endpoint_that_is_written_as_an_address_is_refused_before_a_request(keys: Path) -> None:
    with pytest.raises(TrainerError, match=r"http://2852039166 is not allowed") as refusal:
        _session("http://2852039166", keys, POLICY)
    assert refusal.value.reason is FailureReason.ENDPOINT_NOT_ALLOWED


def test_a_run_without_a_cluster_is_not_restricted(s3_server: S3Server, keys: Path) -> None:
    s3_server.create_bucket("results")
    _session(s3_server.endpoint_url, keys, None).call("head_bucket")
    with pytest.raises(TrainerError, match="the pod itself"):
        _session(s3_server.endpoint_url, keys, POLICY)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("policy", [None, ON_THIS_MACHINE], ids=["on a laptop", "in a pod"])
def test_a_redirect_of_the_store_is_not_followed(
    redirector: str, keys: Path, policy: EndpointPolicy | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Redirector, "status", status)
    session = _session(redirector, keys, policy)
    for operation, key in (("head_bucket", None), ("list_objects_v2", None), ("get_object", "a")):
        with pytest.raises(S3Fault, match=r"redirects, .* \(to http://169\.254\.169\.254\)") as found:
            session.call(operation, key)
        assert found.value.reason is FailureReason.ENDPOINT_REDIRECTED
        assert "secret" not in found.value.message
    assert len(Redirector.seen) == 3


@pytest.fixture
def restricted_hub() -> Iterator[None]:
    """huggingface_hub under the policy of a pod."""
    restrict_hub(ON_THIS_MACHINE)
    yield
    set_client_factory(default_client_factory)


@pytest.mark.usefixtures("restricted_hub")
def test_each_hop_of_the_hub_is_checked(redirector: str) -> None:
    with pytest.raises(TrainerError, match=r"169\.254\.169\.254") as refusal:
        get_session().get(f"{redirector}/acme/tiny/resolve/main/model.safetensors")
    assert refusal.value.reason is FailureReason.ENDPOINT_NOT_ALLOWED


@pytest.mark.usefixtures("restricted_hub")
def test_the_hub_may_redirect_to_a_cdn(redirector: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Redirector, "target", s3_server.endpoint_url)
    answer = get_session().get(f"{redirector}/acme/tiny/resolve/main/model.safetensors")
    assert str(answer.url).rstrip("/") == s3_server.endpoint_url
    assert answer.status_code == 200
