"""The writing half of the hub: new repositories, Git LFS uploads, and commits of both kinds of files."""

import hashlib
import json
from base64 import b64decode
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_test_servers.hub import Hub, HubRepo

LARGE_SUFFIXES = (".safetensors", ".gguf")
Answer = tuple[int, object]


def handle_write(hub: "Hub", path: str, authorization: str, body: bytes) -> Answer:
    """Answer a POST or PUT; only the token that may write is accepted."""
    from finetune_test_servers.hub import TOKEN

    if path.startswith("lfs/"):
        return _store_object(hub, path.removeprefix("lfs/"), body)
    if path == "api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if authorization != f"Bearer {TOKEN}":
        return (403 if authorization else 401), {"error": "no"}
    if path == "api/repos/create":
        return _create(hub, json.loads(body))
    if path.endswith(".git/info/lfs/objects/batch"):
        return 200, _batch(hub, json.loads(body))

    _, _, organisation, name, action, *_ = path.split("/")
    repo = hub.repos.get(f"models/{organisation}/{name}")
    if repo is None:
        return 404, {"error": "no such repository"}
    if action == "preupload":
        files = json.loads(body)["files"]
        return 200, {"files": [_mode(file["path"]) for file in files]}
    if action == "commit":
        return _commit(hub, repo, f"{organisation}/{name}", body)
    return 404, {"error": path}


def _create(hub: "Hub", asked: dict[str, Any]) -> Answer:
    from finetune_test_servers.hub import HubRepo

    name = f"{asked['organization']}/{asked['name']}"
    if f"models/{name}" in hub.repos:
        return 409, {"error": "exists", "url": f"{hub.url}/{name}"}
    hub.repos[f"models/{name}"] = HubRepo({}, private=asked.get("visibility") == "private")
    return 200, {"url": f"{hub.url}/{name}"}


def _mode(path: str) -> dict[str, object]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(LARGE_SUFFIXES) else "regular", "shouldIgnore": False}


def _batch(hub: "Hub", asked: dict[str, Any]) -> dict[str, object]:
    """Returns an upload address for each object that is not stored yet."""
    objects = []
    for entry in asked["objects"]:
        listed = {"oid": entry["oid"], "size": entry["size"]}
        if entry["oid"] not in hub.objects:
            listed["actions"] = {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}
        objects.append(listed)
    return {"transfer": "basic", "objects": objects}


def _store_object(hub: "Hub", oid: str, body: bytes) -> Answer:
    if hashlib.sha256(body).hexdigest() != oid:
        return 400, {"error": "other bytes than announced"}
    hub.objects[oid] = body
    return 200, {}


def _commit(hub: "Hub", repo: "HubRepo", name: str, body: bytes) -> Answer:
    """Make one commit; its body has a header line, then a line for each file."""
    files = {}

    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in hub.objects:
                return 400, {"error": f"{value['path']} was not uploaded"}
            files[value["path"]] = hub.objects[value["oid"]]

    repo.files |= files
    oid = hashlib.sha1(body).hexdigest()
    repo.revisions["main"] = oid
    return 200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"}
