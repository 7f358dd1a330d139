"""Flux's files: manifests of Flux's own type, over folders and jobs that the examples have."""

from pathlib import Path

import pytest
import yaml

from finetune_test_programs.gitops_judges import GITOPS, refuse_kustomization

FILES = sorted((GITOPS / "flux").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_a_kustomization(path: Path) -> None:
    assert refuse_kustomization(path.read_text()) == ""
    folder = yaml.safe_load(path.read_text())["spec"]["path"]
    assert (GITOPS / "examples" / folder / "kustomization.yaml").is_file()


def test_a_field_that_flux_does_not_have_is_refused() -> None:
    text = (GITOPS / "flux/done.yaml").read_text()
    assert "healthChecksExprs" in refuse_kustomization(text.replace("healthCheckExprs", "healthChecksExprs"))


def test_what_serves_waits_for_the_job() -> None:
    done, serve = (yaml.safe_load((GITOPS / f"flux/{name}.yaml").read_text()) for name in ("done", "serve"))
    assert serve["spec"]["dependsOn"] == [{"name": done["metadata"]["name"]}]
