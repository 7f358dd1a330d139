"""The `[operator]` extra alone imports every module of the operator, and brings no torch."""

import json
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PYTHON = CHECKOUT / ".venv-operator/bin/python"
IMPORT_ALL = """
import importlib, importlib.util, json, pkgutil, sys
import finetune_operator
names = [found.name for found in pkgutil.walk_packages(finetune_operator.__path__, "finetune_operator.")]
for name in names:
    importlib.import_module(name)
heavy = [name for name in ("torch", "transformers", "boto3", "triton") if importlib.util.find_spec(name)]
print(json.dumps({"modules": names, "heavy": heavy}))
"""


def test_every_operator_module_imports_without_torch() -> None:
    if not PYTHON.exists():
        pytest.fail("no .venv-operator: run `make setup`")
    done = subprocess.run([PYTHON, "-P", "-c", IMPORT_ALL], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "finetune_operator.reconcile" in found["modules"]
    assert found["heavy"] == []
