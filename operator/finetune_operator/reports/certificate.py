"""The certificate of the progress server, in three files: tls.crt, tls.key, and ca.crt, which trainers trust.

A renewed certificate is used by the next connection. A new authority is another matter: it is written into what every
new trainer reads, and replicas know each other by it. So it ends the process, which starts anew with it.
"""

import asyncio
import logging
import ssl
from pathlib import Path

CHECK_SECONDS = 5.0
CERTIFICATE, KEY, AUTHORITY = "tls.crt", "tls.key", "ca.crt"

logger = logging.getLogger(__name__)


def load_certificate(tls_dir: Path) -> ssl.SSLContext:
    """Returns a TLS context with the server's certificate and key."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, tls_dir)
    return context


def trust_authority(tls_dir: Path) -> ssl.SSLContext:
    """Returns a client's TLS context that trusts the server's authority, as trainers do; without a file of it, the
    public ones."""
    authority = tls_dir / AUTHORITY
    return ssl.create_default_context(cafile=authority if authority.exists() else None)


async def follow_certificate(context: ssl.SSLContext, tls_dir: Path) -> None:
    """Load certificate and key again whenever one of them changes. Returns when the authority has changed."""
    loaded, authority = _read(tls_dir, CERTIFICATE, KEY), _read(tls_dir, AUTHORITY)

    while True:
        await asyncio.sleep(CHECK_SECONDS)
        if _read(tls_dir, AUTHORITY) != authority:
            logger.warning("%s has changed: the operator starts anew, so that trainers learn of it", AUTHORITY)
            return

        found = _read(tls_dir, CERTIFICATE, KEY)
        if found == loaded:
            continue
        try:
            _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), tls_dir)  # tried first: half a pair would stay in use
            _load(context, tls_dir)
        except (OSError, ssl.SSLError) as error:
            logger.warning("the new TLS certificate is not used, the old one is: %s", error)
            continue
        loaded = found
        logger.info("TLS certificate loaded again")


def _load(context: ssl.SSLContext, tls_dir: Path) -> None:
    context.load_cert_chain(tls_dir / CERTIFICATE, tls_dir / KEY)


def _read(tls_dir: Path, *names: str) -> list[bytes]:
    """Contents of files; a missing one counts as empty."""
    paths = [tls_dir / name for name in names]
    return [path.read_bytes() if path.exists() else b"" for path in paths]
