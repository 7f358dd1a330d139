"""Makes the progress server's certificate, and the authority that signs it, where nobody else does.

The authority follows from a seed that every replica has: a token which Kubernetes keeps in a Secret, and which the
kubelet mounts. So all replicas have one authority, byte for byte, also after all of them have restarted: trainers that
run trust it. No key of it is stored anywhere, and the operator needs no right on Secrets. Server keys are new in each
process and last for 90 days.
"""

import asyncio
import datetime
import ipaddress
import logging
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from finetune_operator.errors import SettingsError
from finetune_operator.reports.certificate import AUTHORITY, CERTIFICATE, KEY

VALIDITY = datetime.timedelta(days=90)
RENEWED_AFTER = datetime.timedelta(days=45)
CLOCKS_DIFFER = datetime.timedelta(hours=1)
CHECK_SECONDS = 5.0
MIN_SEED_BYTES = 32

_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_BEGINNING = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_NO_END = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)  # RFC 5280, 4.1.2.5
_AUTHORITY_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-operator authority")])

logger = logging.getLogger(__name__)


class OwnCertificate:
    """Certificate of one replica, in a folder in memory, for as long as it runs."""

    def __init__(self, seed: Path, names: Iterable[str], tls_dir: Path) -> None:
        """`seed`: the file of the token. `names`: host names and addresses under which trainers connect."""
        self._seed_file = seed
        self._names = tuple(dict.fromkeys(names))
        self._tls_dir = tls_dir
        self._seed = b""
        self._renew_at = _BEGINNING

    def write(self) -> None:
        """Write tls.crt, tls.key and ca.crt; raises SettingsError if the seed cannot be used."""
        self._seed = self._read_seed()
        key, authority = make_authority(self._seed)
        own_key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        certificate = _sign(key, authority, own_key, self._names, now)

        self._tls_dir.mkdir(parents=True, exist_ok=True)
        self._put(AUTHORITY, authority.public_bytes(serialization.Encoding.PEM))
        self._put(KEY, _pem(own_key))
        self._put(CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
        self._renew_at = now + RENEWED_AFTER
        logger.info(
            "made a certificate for %s, valid until %s", ", ".join(self._names), certificate.not_valid_after_utc
        )

    async def keep(self) -> None:
        """Renew the certificate until cancelled; also after a change of the seed, which gives another authority."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                if self._read_seed() != self._seed or datetime.datetime.now(datetime.UTC) > self._renew_at:
                    self.write()
            except (OSError, SettingsError) as error:
                logger.warning("the TLS certificate is not renewed, the old one is used: %s", error)

    def _read_seed(self) -> bytes:
        try:
            seed = self._seed_file.read_bytes().strip()
        except OSError as error:
            raise SettingsError(f"FINETUNE_TLS_SEED cannot be read: {error}") from error
        if len(seed) < MIN_SEED_BYTES:
            raise SettingsError(
                f"FINETUNE_TLS_SEED: {self._seed_file} has {len(seed)} bytes, {MIN_SEED_BYTES} are needed"
            )
        return seed

    def _put(self, name: str, content: bytes) -> None:
        """Write a file whole, or not at all; nobody else reads it."""
        partial = self._tls_dir / f".{name}.partial"
        partial.touch(mode=0o600)
        partial.write_bytes(content)
        partial.rename(self._tls_dir / name)


def make_authority(seed: bytes) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Returns the authority's key and certificate: the same bytes for the same seed, wherever and whenever."""
    # 64 bits more than the order has, so that no number is much likelier than another (FIPS 186-5, A.2.1).
    scalar = int.from_bytes(_derive(seed, b"finetune.dev/authority/key", 40)) % (_P256_ORDER - 1) + 1
    key = ec.derive_private_key(scalar, ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False)  # fmt: skip

    certificate = (
        x509.CertificateBuilder()
        .subject_name(_AUTHORITY_NAME)
        .issuer_name(_AUTHORITY_NAME)
        .public_key(key.public_key())
        .serial_number(int.from_bytes(identifier.digest[:8]) | 1)
        .not_valid_before(_BEGINNING)
        .not_valid_after(_NO_END)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    )
    return key, certificate


def _sign(
    authority_key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    names: Iterable[str],
    now: datetime.datetime,
) -> x509.Certificate:
    """Returns a server's certificate for these names."""
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-operator")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + VALIDITY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _derive(seed: bytes, purpose: bytes, length: int) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=None, info=purpose).derive(seed)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
