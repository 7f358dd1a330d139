"""Authorities whose certificates a pod trusts: the public ones, and those of the company that it runs in.

Every library has a variable of its own for one file of authorities, which replaces what it has. So the file is made of
certifi's authorities and the mounted ones, and all of them are pointed at it before any connects.
"""

import os
import re
import ssl
from collections.abc import MutableMapping
from pathlib import Path

import certifi

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError

VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")
"""Read by Python's ssl, httpx and the Hub's Xet; by requests; by botocore."""

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def trust_authorities(
    bundle: Path | None, work: Path, environment: MutableMapping[str, str] = os.environ
) -> Path | None:
    """Makes this process, and those that it starts, trust the authorities in `bundle` beside the public ones. Returns
    the file of all of them; None without a bundle. Raises TrainerError (InvalidConfiguration)."""
    if bundle is None:
        return None

    certificates = _CERTIFICATE.findall(_read(bundle))
    try:
        for certificate in certificates:
            ssl.create_default_context(cadata=certificate.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        message = f"spec.pod.caBundle: the ConfigMap holds a certificate that cannot be read: {error}"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message) from None
    if not certificates:
        message = "spec.pod.caBundle: the ConfigMap's key holds no certificate: write PEM, with its BEGIN and END lines"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)

    together = work / "authorities.pem"
    together.write_bytes(Path(certifi.where()).read_bytes() + b"\n" + b"\n".join(certificates) + b"\n")
    environment.update(dict.fromkeys(VARIABLES, str(together)))
    return together


def _read(bundle: Path) -> bytes:
    try:
        return bundle.read_bytes()
    except OSError as error:
        message = f"spec.pod.caBundle: {bundle} cannot be read: {error.strerror}"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message) from None
