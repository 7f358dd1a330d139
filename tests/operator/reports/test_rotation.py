"""The certificate of a real operator is renewed while it runs, and then its authority changes."""

import ssl
import time
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.reports.certificate import CHECK_SECONDS
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for
from finetune_test_operator.reporter import Reporter
from finetune_test_servers.certificates import Authority

pytestmark = pytest.mark.cluster


def _shown(operator: OperatorProcess) -> str:
    return ssl.get_server_certificate(("127.0.0.1", operator.progress_port), timeout=5)


def test_trainers_report_through_a_renewed_certificate_and_wait_for_a_new_authority(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, reporter: Reporter, tmp_path: Path
) -> None:
    jobs.create("rotated")
    pod = kubelet.wait_for_pod("rotated")
    kubelet.run(pod)
    token = reporter.own_token(pod, "rotated")
    assert reporter.post("rotated", token, 1, step=1) == 202

    # Renewed under the same authority: the same process shows it, and trainers notice nothing.
    pid, before = operator.pid, _shown(operator)
    authority = (operator.tls_dir / "ca.crt").read_text()
    certificate, key = jobs.cluster.serving_certificate("renewed", ["127.0.0.1", "localhost"])
    (operator.tls_dir / "tls.key").write_bytes(key.read_bytes())
    (operator.tls_dir / "tls.crt").write_bytes(certificate.read_bytes())
    wait_for(lambda: _shown(operator) != before, "the renewed certificate", 3 * CHECK_SECONDS)
    assert _shown(operator).strip() == certificate.read_text().strip()
    assert reporter.post("rotated", token, 2, step=2) == 202
    assert operator.is_running
    assert operator.pid == pid

    # A new authority: the process ends by itself, and the next one tells new trainers.
    (operator.tls_dir / "ca.crt").write_text(Authority.create(tmp_path).ca.certificate.read_text() + authority)
    assert operator.wait() == 0
    operator.start()
    jobs.wait("rotated", lambda s: "certificate changed" in str(s["conditions"]), "the reason of its silence")
    name = f"later-{time.monotonic_ns()}"
    jobs.create(name)
    wait_for(lambda: jobs.config_maps(name), "the ConfigMap of a later job")
    (older,), (later,) = jobs.config_maps("rotated"), jobs.config_maps(name)
    assert later.data["run_config.yaml"].count("BEGIN CERTIFICATE") == 2
    assert older.data["run_config.yaml"].count("BEGIN CERTIFICATE") == 1

    # This authority still signs the certificate, so the older trainer reports as before.
    assert reporter.post("rotated", token, 3, step=3) == 202
    jobs.wait("rotated", lambda s: s["progress"]["step"] == 3, "step 3", 20)

    operator.kill()
    (operator.tls_dir / "ca.crt").write_text(authority)
    operator.start()
