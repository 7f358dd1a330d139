"""Argo CD's scripts for a FineTuneJob, by the tests that lie beside them in Argo CD's own form."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.base import Json
from finetune_test_programs.gitops_files import generated_files
from finetune_test_programs.gitops_judges import ARGO, GITOPS, action_scripts, health_script, judge

HEALTH_TESTS = yaml.safe_load((ARGO / "health_test.yaml").read_text())["tests"]
ACTION_TESTS = yaml.safe_load((ARGO / "actions/action_test.yaml").read_text())
DISCOVERY = (ARGO / "actions/discovery.lua").read_text()


def _read(path: Path) -> Json:
    found: Json = yaml.safe_load(path.read_text())
    return found


@pytest.mark.parametrize("case", HEALTH_TESTS, ids=lambda case: Path(case["inputPath"]).stem)
def test_health(case: Any) -> None:
    (answer,) = judge([_read(ARGO / case["inputPath"])], health=health_script())
    assert answer["argo"] == case["healthStatus"]


@pytest.mark.parametrize("case", ACTION_TESTS["discoveryTests"], ids=lambda case: Path(case["inputPath"]).stem)
def test_actions_are_offered_where_they_do_something(case: Any) -> None:
    (answer,) = judge([_read(ARGO / "actions" / case["inputPath"])], discovery=DISCOVERY)
    # An empty Lua table is an empty list.
    found = [{"name": name} | fields for name, fields in dict(answer["discovered"] or {}).items()]
    assert sorted(found, key=str) == sorted(case["result"], key=str)


@pytest.mark.parametrize("case", ACTION_TESTS["actionTests"], ids=lambda case: case["action"])
def test_an_action_changes_one_field(case: Any) -> None:
    name = case["action"]
    (answer,) = judge([_read(ARGO / "actions" / case["inputPath"])], actions={name: action_scripts()[name]})
    assert _plain(answer["acted"][name]) == _plain(_read(ARGO / "actions" / case["expectedOutputPath"]))


def _plain(value: Any) -> Any:
    """The value with every empty section alike: Lua cannot tell an empty list from an empty map, and Argo CD takes
    those of the object."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()} or []
    return [_plain(each) for each in value] if isinstance(value, list) else value


def test_every_script_and_every_object_is_tested() -> None:
    assert {case["action"] for case in ACTION_TESTS["actionTests"]} == set(action_scripts())
    read = {case["inputPath"] for case in HEALTH_TESTS}
    assert read == {f"testdata/{path.name}" for path in (ARGO / "testdata").iterdir()}


def test_the_generated_files_are_fresh() -> None:
    stale = [str(path) for path, text in generated_files().items() if not path.exists() or path.read_text() != text]
    assert stale == [], "run `make generate`"


def test_the_config_map_holds_the_scripts() -> None:
    data = _read(GITOPS / "argocd/argocd-cm.yaml")["data"]
    assert data["resource.customizations.health.finetune.dev_FineTuneJob"] == health_script()
    actions = yaml.safe_load(data["resource.customizations.actions.finetune.dev_FineTuneJob"])
    assert actions["discovery.lua"] == DISCOVERY
    assert {each["name"]: each["action.lua"] for each in actions["definitions"]} == action_scripts()
