"""Authorities that a pod trusts: the public ones and the mounted ones, in one file for every library."""

import ssl
from pathlib import Path

import certifi
import pytest

from finetune_api.failures import FailureReason
from finetune_test_servers.certificates import Authority
from finetune_trainer.errors import TrainerError
from finetune_trainer.sources.authorities import VARIABLES, trust_authorities


def _subjects(file: Path) -> set[str]:
    context = ssl.create_default_context(cafile=str(file))
    return {str(certificate["subject"]) for certificate in context.get_ca_certs()}


def test_mounted_authorities_are_added_to_the_public_ones(tmp_path: Path) -> None:
    bundle = Authority.create(tmp_path / "company").ca.certificate
    environment: dict[str, str] = {}
    together = trust_authorities(bundle, tmp_path, environment)
    assert together is not None
    assert environment == dict.fromkeys(VARIABLES, str(together))
    public = _subjects(Path(certifi.where()))
    assert len(public) > 100
    assert _subjects(together) == public | _subjects(bundle)
    assert _subjects(together) != public


def test_without_a_bundle_nothing_changes(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    assert trust_authorities(None, tmp_path, environment) is None
    assert environment == {}


BROKEN = {
    "an empty file": ("", "holds no certificate"),
    "a key": ("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "holds no certificate"),
    "no certificate inside": ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot be read"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_bundle_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    bundle = tmp_path / "ca.crt"
    bundle.write_text(text)
    with pytest.raises(TrainerError, match=message) as error:
        trust_authorities(bundle, tmp_path, {})
    assert error.value.reason is FailureReason.INVALID_CONFIGURATION
    assert "spec.pod.caBundle" in error.value.message


def test_a_private_key_in_the_bundle_is_not_copied(tmp_path: Path) -> None:
    company = Authority.create(tmp_path / "company")
    bundle = tmp_path / "both.pem"
    bundle.write_text(company.ca.key.read_text() + company.ca.certificate.read_text())
    together = trust_authorities(bundle, tmp_path, {})
    assert together is not None
    assert "PRIVATE KEY" not in together.read_text()
