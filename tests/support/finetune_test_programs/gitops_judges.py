"""What kstatus, Flux and Argo CD say about objects: their own libraries, in the Go program tests/support/gitops."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune_api.base import Json
from finetune_test_programs.binaries import gitops_binary

GITOPS = Path(__file__).parents[3] / "crds/gitops"
ARGO = GITOPS / "argocd/resource_customizations/finetune.dev/FineTuneJob"


def judge(objects: Sequence[Json], **request: Any) -> list[Json]:
    """What each judge says about each object. Keyword arguments are further fields of the program's request."""
    document = json.dumps({"objects": list(objects)} | request)
    done = subprocess.run([gitops_binary()], input=document, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the judges cannot answer: {done.stderr[-2000:]}")
    answers: list[Json] = json.loads(done.stdout)
    return answers


def refuse_kustomization(text: str) -> str:
    """Returns what Flux's own type says against a manifest; empty if nothing."""
    command = [str(gitops_binary()), "kustomization"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False).stderr


def health_script() -> str:
    """Argo CD's health script for a FineTuneJob."""
    return (ARGO / "health.lua").read_text()


def action_scripts() -> Mapping[str, str]:
    """Argo CD's actions on a FineTuneJob, by name."""
    return {path.parent.name: path.read_text() for path in sorted((ARGO / "actions").glob("*/action.lua"))}


def flux_expressions(mode: str) -> Json:
    """The expressions of a Flux Kustomization, `done` or `accepted`."""
    kustomization = yaml.safe_load((GITOPS / f"flux/{mode}.yaml").read_text())
    (check,) = kustomization["spec"]["healthCheckExprs"]
    assert (check.pop("apiVersion"), check.pop("kind")) == ("finetune.dev/v1alpha1", "FineTuneJob")
    found: Json = check
    return found
