"""A renewed certificate is used without a restart, half of one is not, and a new authority ends the process."""

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509

from finetune_operator.reports import certificate
from finetune_operator.reports.certificate import follow_certificate, load_certificate
from finetune_test_servers.certificates import Authority


class Server:
    """A TLS server that follows the certificate of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tls"
        self.authority = Authority.create(folder / "authority")
        self.port = 0

    def give(self, name: str, *files: str) -> int:
        """Put a new certificate into the folder; returns its number. `files`: those that are written."""
        pair = self.authority.server(name, name, ("127.0.0.1",))
        self.folder.mkdir(exist_ok=True)
        for file, source in (("tls.crt", pair.certificate), ("tls.key", pair.key)):
            if not files or file in files:
                shutil.copy(source, self.folder / file)
        shutil.copy(self.authority.ca.certificate, self.folder / "ca.crt")
        return x509.load_pem_x509_certificate(pair.certificate.read_bytes()).serial_number

    async def shown(self) -> int:
        """Connects; returns the number of the certificate that a trainer sees."""
        trusted = ssl.create_default_context(cafile=str(self.authority.ca.certificate))
        _, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=trusted)
        found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return x509.load_der_x509_certificate(found).serial_number

    @asynccontextmanager
    async def follow(self) -> AsyncIterator["asyncio.Task[None]"]:
        """Serve until the test ends; yields the task that looks at the files."""
        context = load_certificate(self.folder)
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        task = asyncio.create_task(follow_certificate(context, self.folder))
        await asyncio.sleep(0)
        async with server:
            yield task
        task.cancel()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(certificate, "CHECK_SECONDS", 0.02)
    server = Server(tmp_path)
    server.give("first")
    return server


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.01)


async def test_the_next_connection_sees_the_renewed_certificate(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with server.follow() as task:
        first = await server.shown()
        second = server.give("second")
        await _until(lambda: "loaded again" in caplog.text)
        assert await server.shown() == second != first
        assert not task.done()


async def test_a_certificate_without_its_key_changes_nothing(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async with server.follow() as task:
        first = await server.shown()
        server.give("half", "tls.crt")
        await _until(lambda: "the old one is" in caplog.text)
        assert await server.shown() == first

        (server.folder / "tls.crt").unlink()
        await asyncio.sleep(0.1)
        assert await server.shown() == first

        whole = server.give("whole")
        async with asyncio.timeout(5):
            while await server.shown() != whole:
                await asyncio.sleep(0.01)
        assert not task.done()


async def test_a_new_authority_ends_the_process(server: Server, tmp_path: Path) -> None:
    async with server.follow() as task:
        server.authority = Authority.create(tmp_path / "another")
        server.give("other")
        async with asyncio.timeout(5):
            await task
