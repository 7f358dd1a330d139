"""Volumes of a pod as folders on the host: configMap, secret, projected, downwardAPI, emptyDir and claims of hostPath
volumes."""

import base64
import time
from pathlib import Path
from typing import Any

from finetune_devcluster.process_node.api import Api, ApiError, Object

REFRESH_SHARE = 0.8  # a kubelet renews a projected token when 80 % of its life is over


class ContainerConfigError(Exception):
    """Something that the pod refers to is missing; the message is the kubelet's."""


def field_value(pod: Object, path: str) -> str:
    """Downward API: a field of the pod as text."""
    if path.endswith("']"):
        parent, key = path[:-2].split("['")
        return str(field_map(pod, parent).get(key, ""))
    value: Any = pod
    for part in path.split("."):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    if isinstance(value, dict):
        return "".join(f'{key}="{text}"\n' for key, text in sorted(value.items()))
    return str(value)


def field_map(pod: Object, path: str) -> dict[str, str]:
    """metadata.labels or metadata.annotations."""
    mapping: dict[str, str] = pod["metadata"].get(path.removeprefix("metadata."), {})
    return mapping


async def read_values(api: Api, namespace: str, kind: str, name: str, optional: bool) -> dict[str, bytes] | None:
    """Returns keys and values of a ConfigMap or Secret; None if it is optional and missing."""
    try:
        found = await api.call("GET", f"/api/v1/namespaces/{namespace}/{kind}s/{name}")
    except ApiError as error:
        if error.status == 404 and optional:
            return None
        if error.status in (403, 404):
            label = {"secret": "secret", "configmap": "configmap"}[kind]
            raise ContainerConfigError(f'{label} "{name}" not found') from None
        raise

    if kind == "secret":
        return {key: base64.b64decode(value) for key, value in (found.get("data") or {}).items()}
    binary = {key: base64.b64decode(value) for key, value in (found.get("binaryData") or {}).items()}
    return {key: value.encode() for key, value in (found.get("data") or {}).items()} | binary


class Volumes:
    """The volumes of one pod. `tokens` lists the files that must be renewed before they expire."""

    def __init__(self, api: Api, pod: Object, folder: Path) -> None:
        self._api = api
        self._pod = pod
        self._folder = folder
        self._namespace = pod["metadata"]["namespace"]
        self._tokens: list[tuple[float, Path, Object]] = []
        self.paths: dict[str, Path] = {}

    async def make(self) -> None:
        """Write every volume; raises ContainerConfigError if an object is missing."""
        for volume in self._pod["spec"].get("volumes", []):
            target = self._folder / volume["name"]
            target.mkdir(parents=True, exist_ok=True)
            self.paths[volume["name"]] = target
            await self._fill(volume, target)

    async def renew_tokens(self) -> None:
        """Renew projected tokens that are due."""
        due = [entry for entry in self._tokens if entry[0] <= time.time()]
        for entry in due:
            self._tokens.remove(entry)
            await self._write_token(entry[1], entry[2])

    async def _fill(self, volume: Object, target: Path) -> None:
        if source := volume.get("configMap"):
            await self._write_values("configmap", source["name"], source, target)
        elif source := volume.get("secret"):
            await self._write_values("secret", source["secretName"], source, target)
        elif source := volume.get("downwardAPI"):
            self._write_downward(source, target)
        elif source := volume.get("projected"):
            for part in source.get("sources", []):
                await self._fill_projection(part, target)
        elif source := volume.get("persistentVolumeClaim"):
            self.paths[volume["name"]] = await self._claim_path(source["claimName"])
        elif "emptyDir" not in volume:
            raise ContainerConfigError(f"volume {volume['name']}: the process node has no such kind of volume")

    async def _fill_projection(self, part: Object, target: Path) -> None:
        if source := part.get("serviceAccountToken"):
            await self._write_token(target / source["path"], source)
        elif source := part.get("configMap"):
            await self._write_values("configmap", source["name"], source, target)
        elif source := part.get("secret"):
            await self._write_values("secret", source["name"], source, target)
        elif source := part.get("downwardAPI"):
            self._write_downward(source, target)

    async def _write_values(self, kind: str, name: str, source: Object, target: Path) -> None:
        values = await read_values(self._api, self._namespace, kind, name, bool(source.get("optional")))
        if values is None:
            return

        items = source.get("items") or [{"key": key, "path": key} for key in values]
        for item in items:
            if item["key"] not in values:
                if source.get("optional"):
                    continue
                raise ContainerConfigError(f'{kind} "{name}" has no key {item["key"]}')
            path = target / item["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(values[item["key"]])

    def _write_downward(self, source: Object, target: Path) -> None:
        for item in source.get("items", []):
            (target / item["path"]).write_text(field_value(self._pod, item["fieldRef"]["fieldPath"]))

    async def _write_token(self, path: Path, source: Object) -> None:
        lifetime = source.get("expirationSeconds", 3600)
        metadata = self._pod["metadata"]
        account = self._pod["spec"].get("serviceAccountName", "default")
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": [source["audience"]] if source.get("audience") else None,
                "expirationSeconds": lifetime,
                "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]},
            },
        }

        url = f"/api/v1/namespaces/{self._namespace}/serviceaccounts/{account}/token"
        answer = await self._api.call("POST", url, request)

        # Renamed into place, so that no process ever reads half a token.
        partial = path.with_name(f".{path.name}.partial")
        partial.touch(mode=0o600)
        partial.write_text(answer["status"]["token"])
        partial.rename(path)

        self._tokens.append((time.time() + lifetime * REFRESH_SHARE, path, source))

    async def _claim_path(self, name: str) -> Path:
        claim = await self._api.call("GET", f"/api/v1/namespaces/{self._namespace}/persistentvolumeclaims/{name}")
        volume = await self._api.call("GET", f"/api/v1/persistentvolumes/{claim['spec']['volumeName']}")
        if "hostPath" not in volume["spec"]:
            raise ContainerConfigError(
                f"persistentvolume {volume['metadata']['name']}: only hostPath is supported here"
            )
        return Path(volume["spec"]["hostPath"]["path"])
