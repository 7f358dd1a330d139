"""Users of limited rights, and the commands as they type them."""

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from kubernetes import client

from finetune_api.base import Json
from finetune_client.main import main
from finetune_devcluster.cluster import DevCluster

READER = (("finetune.dev", "finetunejobs", "get,list"),)
OWNER = (
    ("finetune.dev", "finetunejobs", "get,list,create,patch,delete"),
    ("", "pods", "get,list"),
    ("", "events", "list"),
)
"""Rights in one's namespace; pods/log and nodes are missing on purpose."""


class Said(NamedTuple):
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def finetune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`kubectl finetune` with some words."""

    def run(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["kubectl-finetune", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    return run


class Users:
    """Service accounts of the test's namespace, each with a kubeconfig."""

    def __init__(self, cluster: DevCluster, namespace: str, folder: Path) -> None:
        self.cluster, self.namespace, self.folder = cluster, namespace, folder
        self._core: Any = client.CoreV1Api(cluster.api_client())
        self._rbac: Any = client.RbacAuthorizationV1Api(cluster.api_client())

    def make(self, name: str, rights: tuple[tuple[str, str, str], ...]) -> Path:
        """A user with these rights (group, resource, verbs) in the namespace; returns the kubeconfig with a token."""
        self._core.create_namespaced_service_account(self.namespace, {"metadata": {"name": name}})
        rules = [
            {"apiGroups": [group], "resources": [what], "verbs": verbs.split(",")} for group, what, verbs in rights
        ]
        self._rbac.create_namespaced_role(self.namespace, {"metadata": {"name": name}, "rules": rules})
        binding = {
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": self.namespace}],
        }
        self._rbac.create_namespaced_role_binding(self.namespace, binding)
        return self.kubeconfig(name, {"token": self.token(name)})

    def owner(self) -> Path:
        """A user who does everything with jobs, but reads no logs and no nodes."""
        return self.make("owner", OWNER)

    def reader(self) -> Path:
        """A user who only looks at jobs."""
        return self.make("reader", READER)

    def token(self, name: str) -> str:
        """A token of a user."""
        asked = self._core.create_namespaced_service_account_token(name, self.namespace, {"spec": {}})
        return str(asked.status.token)

    def with_plugin(self, name: str, user: str) -> Path:
        """A kubeconfig whose exec plugin hands out a user's token."""
        credential = {
            "apiVersion": "client.authentication.k8s.io/v1",
            "kind": "ExecCredential",
            "status": {"token": self.token(user)},
        }
        plugin = self.folder / f"{name}-plugin"
        plugin.write_text(f"#!/bin/sh\necho '{json.dumps(credential)}'\n")
        plugin.chmod(plugin.stat().st_mode | stat.S_IXUSR)
        return self.kubeconfig(name, plugin_user(plugin))

    def kubeconfig(self, name: str, user: Json, server: str | None = None, authority: Path | None = None) -> Path:
        """A kubeconfig with one context, `dev`, in the test's namespace."""
        ca = {"certificate-authority": str(authority or self.cluster.ca_file)}
        context = {"cluster": "dev", "user": name, "namespace": self.namespace}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "dev", "cluster": {"server": server or self.cluster.api_url} | ca}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "dev", "context": context}],
            "current-context": "dev",
        }
        path = self.folder / f"{name}.kubeconfig"
        path.write_text(json.dumps(document))
        return path


def plugin_user(plugin: Path) -> Json:
    """The user of a kubeconfig who logs in by a program."""
    version = "client.authentication.k8s.io/v1"
    return {"exec": {"apiVersion": version, "command": str(plugin), "interactiveMode": "Never"}}


@pytest.fixture
def users(dev_cluster: DevCluster, namespace: str, tmp_path: Path) -> Users:
    return Users(dev_cluster, namespace, tmp_path)
