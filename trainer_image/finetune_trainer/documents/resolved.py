"""`resolved.yaml`: everything that determined the result, with defaults written out and branches resolved to commits.

Names of Secrets are left out: readers of the artifacts cannot use them.
"""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
import yaml

from finetune_api.progress import MemoryUse, Resolved
from finetune_api.run_config import RunConfig

# Packages whose versions can change the numbers.
PACKAGES = (
    *("finetune-operator", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets"),
    *("tokenizers", "safetensors", "gguf", "numpy"),
)
_PRIVATE = ("credentials",)


def describe_run(
    config: RunConfig,
    resolved: Resolved,
    *,
    model_digest: str,
    metrics: Mapping[str, float],
    memory: MemoryUse | None = None,
) -> dict[str, Any]:
    """Returns the run as data for YAML: the job, what it was resolved to, memory, metrics and versions."""
    run = _without_private(config.to_wire())
    for part in ("apiVersion", "kind", "progress", "checkpointsToKeep", "terminationGracePeriodSeconds"):
        run.pop(part, None)  # about the cluster, not about the result

    return {
        "specDigest": config.spec_digest(),
        **run,
        "resolved": resolved.to_wire() | {"modelDigest": model_digest},
        **({"memory": memory.to_wire()} if memory is not None else {}),
        "metrics": dict(metrics),
        "versions": _versions(),
    }


def write_resolved(description: Mapping[str, Any]) -> str:
    """Returns the text of resolved.yaml."""
    note = "# Everything that determined this result. Digests are SHA-256 over `sha256sum` lines of the files.\n"
    return note + yaml.safe_dump(dict(description), sort_keys=False, allow_unicode=True)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "gpu": torch.cuda.get_device_name()}
    return found


def _without_private(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_private(entry) for name, entry in value.items() if name not in _PRIVATE}
    if isinstance(value, list):
        return [_without_private(entry) for entry in value]
    return value
