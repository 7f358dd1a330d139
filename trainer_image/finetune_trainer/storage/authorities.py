"""Authorities whose certificates a pod trusts: the public ones, and those of the company that it runs in.

Every library has a variable of its own for one file of authorities, which replaces what it has. So the file is made of
certifi's authorities and the mounted ones, and all of them are pointed at it before any connects.
"""

import os
import re
import ssl
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import certifi

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError

VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")
"""Read by Python's ssl, httpx and the Hub's Xet; by requests; by botocore."""

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_ADVICE = (
    "if a proxy or an authority of your own signs it, spec.pod.caBundle names the ConfigMap with that authority's "
    "certificate"
)


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


def explain_untrusted(error: BaseException) -> str | None:
    """Says that a server's certificate is not trusted, and what to do, if that is what an error comes from."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the certificate of the server is not trusted ({cause.verify_message}): {_ADVICE}"
    return None


def _read(bundle: Path) -> bytes:
    try:
        return bundle.read_bytes()
    except OSError as error:
        message = f"spec.pod.caBundle: {bundle} cannot be read: {error.strerror}"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message) from None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it: libraries keep theirs as cause, as argument, or, as botocore does, by name."""
    todo, seen = [error], set[int]()
    while todo:
        cause = todo.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause

        kept = getattr(cause, "kwargs", {})
        named = kept.values() if isinstance(kept, dict) else ()
        behind = (cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args, *named)
        todo += [each for each in behind if isinstance(each, BaseException)]
