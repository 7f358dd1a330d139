"""Each way in which a cluster is out of reach or refuses: one sentence, an exit code, no traceback."""

from pathlib import Path
from typing import Any

import pytest

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.operator_process import OperatorProcess

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("place", "code", "sentence"),
    [
        ("missing", 5, "no cluster is configured"),
        ("broken", 5, "kubeconfig"),
        ("unreachable", 5, "cannot be reached: check the network, the VPN and the context"),
        ("authority", 5, "the certificate of https://"),
        ("expired", 5, "the cluster does not accept your login (401)"),
        ("no-plugin", 5, "the login program of the context failed"),
    ],
)
def test_a_cluster_that_cannot_be_used_is_one_sentence(
    users: Any, finetune: Any, tmp_path: Path, dev_cluster: DevCluster, place: str, code: int, sentence: str
) -> None:
    said = finetune("list", "--kubeconfig", _kubeconfig(users, tmp_path, dev_cluster, place))
    assert (said.code, said.out) == (code, "")
    assert sentence in said.err
    assert said.err.count("\n") == 1


def _kubeconfig(users: Any, folder: Path, cluster: DevCluster, place: str) -> Path:
    if place == "missing":
        return folder / "nothing"
    if place == "broken":
        (folder / "broken").write_text("clusters: [{")
        return folder / "broken"
    if place == "unreachable":
        made: Path = users.kubeconfig(place, {"token": "x"}, server="https://127.0.0.1:1")
    elif place == "authority":
        made = users.kubeconfig(place, {"token": "x"}, authority=_other_authority(cluster))
    elif place == "expired":
        made = users.kubeconfig(place, {"token": "x"})
    else:
        plugin = {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": "no-such-login",
            "interactiveMode": "Never",
        }
        made = users.kubeconfig(place, {"exec": plugin})
    return made


def _other_authority(cluster: DevCluster) -> Path:
    """A certificate that has not signed the API server's."""
    certificate, _ = cluster.serving_certificate("other", ["localhost"])
    return certificate


def test_a_context_that_does_not_exist_is_named(users: Any, finetune: Any) -> None:
    path = users.kubeconfig("me", {"token": "x"})
    said = finetune("list", "--kubeconfig", path, "--context", "prod")
    assert (said.code, said.err) == (
        5,
        "the kubeconfig has no context prod: `kubectl config get-contexts` lists them\n",
    )


def test_a_missing_right_is_named_with_the_role_to_ask_for(
    operator: OperatorProcess, users: Any, finetune: Any, jobs: Any, namespace: str
) -> None:
    me = ("--kubeconfig", users.reader())
    jobs.create("bot")
    assert finetune("list", *me).code == 0
    said = finetune("cancel", "bot", *me)
    assert said.code == 4
    wanted = f"you may not delete finetunejobs.finetune.dev in namespace {namespace}: ask an administrator for a role"
    assert said.err.startswith(wanted)
    assert jobs.exists("bot")
    for words in (("list", "-A"), ("suspend", "bot"), ("logs", "bot"), ("events", "bot")):
        refused = finetune(*words, *me)
        assert refused.code == 4, words
        assert refused.err.startswith("you may not "), words


def test_a_login_program_brings_its_token(operator: OperatorProcess, users: Any, finetune: Any, jobs: Any) -> None:
    users.reader()
    jobs.create("bot")
    said = finetune("list", "--kubeconfig", users.with_plugin("by-plugin", "reader"))
    assert said.code == 0, said.err
    assert "bot" in said.out


def test_a_missing_job_a_missing_namespace_and_a_missing_crd_are_told_apart(
    operator: OperatorProcess,
    users: Any,
    finetune: Any,
    jobs: Any,
    namespace: str,
    tmp_path: Path,
    dev_cluster: DevCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    admin = ("--kubeconfig", dev_cluster.kubeconfig, "-n")
    jobs.create("support-bot")
    said = finetune("describe", "suport-bot", *admin, namespace)
    assert (said.code, said.err) == (
        3,
        f"there is no job suport-bot in namespace {namespace}: did you mean support-bot?\n",
    )

    (tmp_path / "job.yaml").write_text(
        "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: bot}\n"
        "spec: {model: {source: s3://m/t/}, dataset: {source: s3://d/c.jsonl}, output: {s3: {bucket: results}}}\n"
    )
    nowhere = finetune("submit", tmp_path / "job.yaml", *admin, "nowhere")
    assert nowhere.code == 3
    assert nowhere.err.startswith("there is no namespace nowhere")

    (tmp_path / "job.yaml").write_text(
        "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: bot}\n"
        "spec: {model: {source: s3://m/t/}, dataset: {source: s3://d/c.jsonl}, output: {s3: {}}}\n"
    )
    invalid = finetune("submit", tmp_path / "job.yaml", *admin, namespace)
    assert invalid.code == 10
    assert "spec.output.s3.bucket" in invalid.err

    # A resource that the API server does not serve, which is what a cluster without the CRD answers.
    monkeypatch.setattr("finetune_client.connection.PLURAL", "finetunejobz")
    for words in (("list",), ("describe", "bot")):
        absent = finetune(*words, *admin, namespace)
        assert absent.code == 6, words
        assert "ask an administrator to install the chart" in absent.err
