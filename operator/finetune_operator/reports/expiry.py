"""Finds out when the progress server's certificate expires, by a handshake in memory: Python parses the certificates of
peers only."""

import ssl
from pathlib import Path

from finetune_operator.reports.certificate import trust_authority


def certificate_expiry(server: ssl.SSLContext, tls_dir: Path) -> float | None:
    """Returns the Unix time at which the certificate of a context expires; None if it is not valid any more, or not
    signed by the authority in `tls_dir`."""
    client = trust_authority(tls_dir)
    client.check_hostname = False

    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):  # messages of a handshake, with room
        for side in (asking, answering):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError:
                return None

    certificate = asking.getpeercert()
    return float(ssl.cert_time_to_seconds(str(certificate["notAfter"]))) if certificate else None
