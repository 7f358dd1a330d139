"""Every value of the chart is in its schema and its README, and changes what is installed: none is ignored."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_readme import CHART, page, resolve, values

from finetune_test_programs.chart import Object, of_kind, render_each, render_text

pytestmark = pytest.mark.cluster
EVERY_VALUE = Path(__file__).parent / "every_value.yaml"
OF_HELM = {"global"}
"""Helm gives it to every subchart."""

NOT_ALONE = {"serviceAccount.create", "metrics.podMonitor.enabled", "networkPolicy.trainers.enabled"}
NOT_AWAY = {"serviceAccount.name", "metrics.tokenSecret.name", "networkPolicy.operator.metricsFrom"}
"""The chart refuses one of them without the other."""

TESTED_ALONE = {"crds.enabled", "crds.keep", "metrics.tokenSecret.name", "tls.secretName"}
TESTED_ALONE |= {"networkPolicy.operator.metricsFrom"}
"""200 copies of the CRD take helm a minute; the chart refuses the others beside, or without, what the file has."""

UNCOMMENTED = {"health", "logLevel", "podAnnotations", "podLabels", "resources", "nodeSelector", "tolerations"}
UNCOMMENTED |= {"affinity", "priorityClassName", "securityContext", "extraVolumes", "extraVolumeMounts"}
"""Kubernetes' own words."""

PATHS = [".".join(value.path) for value in values() if not value.is_section]


def in_schema(schema: Object, above: tuple[str, ...] = ()) -> set[str]:
    """Returns the paths of a schema's values."""
    schema, found = resolve(schema), set()
    for name, below in schema.get("properties", {}).items():
        found |= in_schema(below, (*above, name)) or {".".join((*above, name))}
    return found


def at(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


def put(tree: Object, path: str, value: Any) -> Object:
    """Returns a copy of values with one of them replaced."""
    tree = copy.deepcopy(tree)
    *above, last = path.split(".")
    place = tree
    for name in above:
        place = place.setdefault(name, {})
    place[last] = value
    return tree


def test_values_and_schema_have_the_same_keys() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert in_schema(schema) - OF_HELM == set(PATHS)


def test_every_value_changes_what_is_installed(tmp_path: Path) -> None:
    defaults, others = yaml.safe_load((CHART / "values.yaml").read_text()), yaml.safe_load(EVERY_VALUE.read_text())
    defaults = put(defaults, "crds.enabled", False)
    missing = [path for path in PATHS if path not in in_other_values(others)]
    assert not missing, f"write another value than the default into {EVERY_VALUE.name}"

    # Each value alone, and all but each one: some show only where another is set, or is not.
    alone = [defaults if path in NOT_ALONE else put(defaults, path, at(others, path)) for path in PATHS]
    all_but = [others if path in NOT_AWAY else put(others, path, at(defaults, path)) for path in PATHS]
    plain, whole, *texts = render_each(tmp_path / "copies", [defaults, others, *alone, *all_but])
    pairs = zip(PATHS, texts[: len(PATHS)], texts[len(PATHS) :], strict=True)
    assert {path for path, one, rest in pairs if one == plain and rest == whole} == TESTED_ALONE


def in_other_values(others: Object) -> set[str]:
    found = set()
    for path in PATHS:
        try:
            at(others, path)
        except (KeyError, TypeError):
            continue
        found.add(path)
    return found


def test_no_template_asks_for_a_value_that_does_not_exist() -> None:
    asked = set()
    for template in filter(Path.is_file, (CHART / "templates").rglob("*")):
        asked |= set(re.findall(r"\$?\.Values\.([A-Za-z.]+[A-Za-z])", template.read_text()))
    known = {".".join(value.path) for value in values()}
    assert {path for path in asked if path not in known} == set()


def test_every_value_is_explained() -> None:
    silent = {value.path[0] for value in values() if len(value.path) == 1 and not value.comment}
    assert silent <= UNCOMMENTED


def test_the_readme_is_fresh() -> None:
    assert (CHART / "README.md").read_text() == page(), "README.md of the chart is stale: run `make generate`"


def test_the_crd_goes_and_stays_as_it_is_asked_for() -> None:
    documents = list(yaml.safe_load_all(render_text("--set", "crds.keep=false")))
    (definition,) = of_kind([document for document in documents if document], "CustomResourceDefinition")
    assert "annotations" not in definition["metadata"]


def test_the_catalogue_of_charts_names_the_images_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    images = yaml.safe_load(chart["annotations"]["artifacthub.io/images"])
    assert {entry["image"] for entry in images} == {
        f"{name}:{chart['appVersion']}" for name in ("finetune-operator", "finetune-trainer")
    }
