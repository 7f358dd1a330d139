"""Environment, command and arguments of a container's process, with mount paths turned into host paths.

There is no mount namespace. Every `mountPath` (and the termination message's path) is substituted wherever it stands
at a path boundary in an environment value, the command or an argument, the longest first. So a program works here if
it takes its paths from there, which is a good habit anyway.
"""

import re
from pathlib import Path

from finetune_devcluster.process_node.api import Api, Object
from finetune_devcluster.process_node.volumes import ContainerConfigError, Volumes, field_value, read_values

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")


class PathMap:
    """Substitutes container paths by host paths."""

    def __init__(self, mapping: dict[str, Path]) -> None:
        longest_first = sorted(mapping, key=len, reverse=True)
        self._mapping = {path.rstrip("/"): str(mapping[path]) for path in longest_first}
        names = "|".join(re.escape(path) for path in self._mapping)
        self._pattern = re.compile(rf"(?<![\w./-])({names})(?![\w.-])") if names else None

    def apply(self, text: str) -> str:
        """The text with every known container path replaced."""
        return self._pattern.sub(lambda match: self._mapping[match[1]], text) if self._pattern else text


def path_map(container: Object, volumes: Volumes, termination_log: Path) -> PathMap:
    """The mounts of one container."""
    mapping = {container.get("terminationMessagePath", "/dev/termination-log"): termination_log}
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes.paths:
            continue  # the service account's own volume, where the pod asked for none
        mapping[mount["mountPath"]] = volumes.paths[mount["name"]] / mount.get("subPath", "")
    return PathMap(mapping)


def expand(text: str, values: dict[str, str]) -> str:
    """`$(NAME)` as Kubernetes expands it: unknown names stay, `$$` is a dollar sign."""

    def replacement(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else values.get(match[1], match[0])

    return REFERENCE.sub(replacement, text)


async def declared_environment(api: Api, pod: Object, container: Object) -> dict[str, str]:
    """`env` and `envFrom` of a container, with field, Secret and ConfigMap references resolved."""
    namespace = pod["metadata"]["namespace"]
    values: dict[str, str] = {}

    for source in container.get("envFrom", []):
        kind, reference = (
            ("secret", source["secretRef"]) if "secretRef" in source else ("configmap", source["configMapRef"])
        )
        found = await read_values(api, namespace, kind, reference["name"], bool(reference.get("optional")))
        values |= {source.get("prefix", "") + key: value.decode() for key, value in (found or {}).items()}

    for entry in container.get("env", []):
        if "valueFrom" not in entry:
            values[entry["name"]] = expand(entry.get("value", ""), values)
        elif (value := await _referenced(api, pod, entry["valueFrom"])) is not None:
            values[entry["name"]] = value
    return values


async def _referenced(api: Api, pod: Object, source: Object) -> str | None:
    if field := source.get("fieldRef"):
        return field_value(pod, field["fieldPath"])
    for kind, name in (("secret", "secretKeyRef"), ("configmap", "configMapKeyRef")):
        if reference := source.get(name):
            optional = bool(reference.get("optional"))
            found = await read_values(api, pod["metadata"]["namespace"], kind, reference["name"], optional)
            if found is not None and reference["key"] in found:
                return found[reference["key"]].decode()
            if optional:
                return None
            raise ContainerConfigError(f"couldn't find key {reference['key']} in {kind} {reference['name']}")
    raise ContainerConfigError(f"the process node cannot resolve {sorted(source)}")


def process_environment(
    declared: dict[str, str], paths: PathMap, programs: Path, home: Path, api_url: str
) -> dict[str, str]:
    """The whole environment of the process: a clean base, then what the container declares."""
    host, _, port = api_url.removeprefix("https://").partition(":")
    base = {
        "PATH": f"{programs}:{SYSTEM_PATH}",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "KUBERNETES_SERVICE_HOST": host,
        "KUBERNETES_SERVICE_PORT": port,
    }
    return base | {name: paths.apply(value) for name, value in declared.items()}


def command_line(container: Object, declared: dict[str, str], paths: PathMap) -> list[str]:
    """Command and arguments. An image's own entry point is not known here, so a command must be given."""
    if not container.get("command"):
        raise ContainerConfigError("the process node needs a command: it cannot read an image's entry point")
    words = [*container["command"], *container.get("args", [])]
    return [paths.apply(expand(word, declared)) for word in words]
