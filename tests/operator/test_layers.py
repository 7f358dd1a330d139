"""What decides knows no cluster: the pure modules, imported alone, load no client."""

import json
import subprocess
import sys

import pytest

PURE = (
    "decide",
    "decide_preflight",
    "decision",
    "running",
    "shared_children",
    "conditions",
    "status",
    "events",
    "failure",
    "attempts",
    "preflight_status",
    "progress_status",
    "waiting",
    "children",
    "observed",
    "desired.names",
    "desired.preflight_job",
    "desired.run_config_map",
    "desired.trainer_job",
    "desired.trainer_pod",
)
CLIENTS = {"kopf", "kubernetes", "aiohttp", "requests", "urllib3"}


def _loaded_with(module: str) -> set[str]:
    code = f"import json, sys, {module}; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_pure_modules_load_no_client() -> None:
    code = ", finetune_operator.".join(PURE)
    assert not CLIENTS & _loaded_with(f"finetune_operator.{code}")


@pytest.mark.parametrize("module", ["cluster", "main"])
def test_the_others_do_so_the_test_sees_clients(module: str) -> None:
    assert CLIENTS & _loaded_with(f"finetune_operator.{module}")
