"""The certificate that the operator makes: one authority for one seed, for ever, and server keys of each process."""

import asyncio
import hashlib
import ssl
import stat
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from finetune_operator.errors import SettingsError
from finetune_operator.reports import own_certificate
from finetune_operator.reports.certificate import load_certificate, trust_authority
from finetune_operator.reports.expiry import certificate_expiry
from finetune_operator.reports.own_certificate import OwnCertificate, make_authority

SEED = b"seed of the tests, long enough to be one"
FINGERPRINT = "24f74c915473ede5ac2717ab074975dafbe8707cf5a5080df439bd021d448b9e"
"""SHA-256 of the authority's certificate for SEED: another version of the operator, or of the library, that makes
another one would cut off the trainers that run."""


def _made(folder: Path, seed: bytes = SEED, *names: str) -> OwnCertificate:
    folder.mkdir(exist_ok=True)
    (folder / "seed").write_bytes(seed)
    certificate = OwnCertificate(folder / "seed", names or ("operator.test",), folder / "tls")
    certificate.write()
    return certificate


def _shake_hands(client: Path, server: Path, name: str, strictly: bool = False) -> None:
    """Connect as a trainer does that trusts `client`/ca.crt; raises ssl.SSLError if the server is not trusted."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = trust_authority(client)
    if strictly:
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    asking = context.wrap_bio(to_client, to_server, server_hostname=name)
    answering = load_certificate(server).wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (asking, answering):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    asking.do_handshake()


def test_the_authority_of_a_seed_is_the_same_in_every_version() -> None:
    _, authority = make_authority(SEED)
    assert hashlib.sha256(authority.public_bytes(Encoding.DER)).hexdigest() == FINGERPRINT
    _, other = make_authority(SEED + b".")
    assert other.public_key() != authority.public_key()


def test_replicas_trust_each_other_and_share_no_server_key(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _made(tmp_path / name)
    first, second = tmp_path / "a/tls", tmp_path / "b/tls"
    assert (first / "ca.crt").read_bytes() == (second / "ca.crt").read_bytes()
    assert (first / "tls.key").read_bytes() != (second / "tls.key").read_bytes()
    _shake_hands(first, second, "operator.test")
    _shake_hands(second, first, "operator.test")

    _made(tmp_path / "c", SEED + b".")
    with pytest.raises(ssl.SSLCertVerificationError):
        _shake_hands(first, tmp_path / "c/tls", "operator.test")


def test_the_certificate_is_for_its_names_only(tmp_path: Path) -> None:
    _made(tmp_path, SEED, "operator.test", "127.0.0.1", "operator.test")
    for name in ("operator.test", "127.0.0.1"):
        _shake_hands(tmp_path / "tls", tmp_path / "tls", name)
    for name in ("other.test", "127.0.0.2"):
        with pytest.raises(ssl.SSLCertVerificationError):
            _shake_hands(tmp_path / "tls", tmp_path / "tls", name)


def test_strict_checks_of_newer_pythons_find_nothing(tmp_path: Path) -> None:
    _made(tmp_path)
    folder = tmp_path / "tls"
    _shake_hands(folder, folder, "operator.test", strictly=True)
    assert certificate_expiry(load_certificate(folder), folder) is not None


def test_only_the_owner_reads_the_key(tmp_path: Path) -> None:
    _made(tmp_path)
    assert stat.S_IMODE((tmp_path / "tls/tls.key").stat().st_mode) == 0o600


def _number(folder: Path) -> int:
    return x509.load_pem_x509_certificate((folder / "tls/tls.crt").read_bytes()).serial_number


async def test_it_is_renewed_in_time_and_the_authority_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_certificate, "CHECK_SECONDS", 0.02)
    certificate = _made(tmp_path)
    number, authority = _number(tmp_path), (tmp_path / "tls/ca.crt").read_bytes()
    keeping = asyncio.create_task(certificate.keep())
    await asyncio.sleep(0.2)
    assert _number(tmp_path) == number, "it is not due yet"

    certificate._renew_at -= own_certificate.RENEWED_AFTER + timedelta(seconds=1)
    await asyncio.sleep(0.2)
    assert _number(tmp_path) != number
    assert (tmp_path / "tls/ca.crt").read_bytes() == authority

    # A seed that is away for a while changes nothing, another one changes the authority.
    number = _number(tmp_path)
    (tmp_path / "seed").unlink()
    await asyncio.sleep(0.1)
    assert _number(tmp_path) == number
    (tmp_path / "seed").write_bytes(SEED + b".")
    await asyncio.sleep(0.2)
    assert (tmp_path / "tls/ca.crt").read_bytes() != authority
    keeping.cancel()


@pytest.mark.parametrize(("seed", "said"), [(b"short", "has 5 bytes, 32 are needed"), (None, "cannot be read")])
def test_a_seed_that_is_none_is_named(tmp_path: Path, seed: bytes | None, said: str) -> None:
    if seed is not None:
        (tmp_path / "seed").write_bytes(seed)
    with pytest.raises(SettingsError, match=said):
        OwnCertificate(tmp_path / "seed", ("operator.test",), tmp_path / "tls").write()
