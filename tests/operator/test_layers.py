"""The pure modules, imported alone, load no Kubernetes client."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import finetune_operator

FOLDERS = ("decide", "status", "desired")
PURE = [
    f"finetune_operator.{folder}.{path.stem}"
    for folder in FOLDERS
    for path in sorted((Path(finetune_operator.__file__).parent / folder).glob("*.py"))
    if path.stem != "__init__"
] + [
    "finetune_operator.election.election",
    "finetune_operator.observe.children",
    "finetune_operator.observe.snapshot",
    "finetune_operator.status_reasons",
]
CLIENTS = {"kopf", "kubernetes", "aiohttp", "requests", "urllib3"}


def _loaded_with(module: str) -> set[str]:
    code = f"import json, sys, {module}; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_pure_modules_load_no_client() -> None:
    assert len(PURE) > 15
    assert not CLIENTS & _loaded_with(", ".join(PURE))


@pytest.mark.parametrize("module", ["cluster.cluster", "main"])
def test_the_others_do_so_the_test_sees_clients(module: str) -> None:
    assert CLIENTS & _loaded_with(f"finetune_operator.{module}")
