"""The chart as helm renders it."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from finetune_test_programs.binaries import helm_binary

CHART = Path(__file__).parents[3] / "charts/finetune-operator"
RELEASE, NAMESPACE = "finetune-operator", "system"

Object = dict[str, Any]


def run_helm(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm without a cluster; the caller looks at its exit status."""
    command = [str(helm_binary()), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def render_text(*settings: str, release: str = RELEASE, namespace: str = NAMESPACE) -> str:
    """Render the chart with these arguments of helm; raises AssertionError with what helm says."""
    version = ("--kube-version", "1.36.3")
    done = run_helm("template", release, str(CHART), "--namespace", namespace, *version, *settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(*settings: str, release: str = RELEASE, namespace: str = NAMESPACE, test: bool = False) -> list[Object]:
    """Render the chart; returns what it installs, or with `test` what `helm test` makes and takes away again."""
    text = render_text(*settings, release=release, namespace=namespace)
    documents = [document for document in yaml.safe_load_all(text) if document]
    return [document for document in documents if test is _is_of_the_test(document)]


def _is_of_the_test(document: Object) -> bool:
    return (document["metadata"].get("annotations") or {}).get("helm.sh/hook") == "test"


def of_kind(documents: Iterable[Object], *kinds: str) -> list[Object]:
    """Returns the objects of some kinds."""
    return [document for document in documents if document["kind"] in kinds]


def operator_pod(documents: Iterable[Object]) -> Object:
    """Returns the pod's spec in the operator's Deployment."""
    (deployment,) = of_kind(documents, "Deployment")
    spec: Object = deployment["spec"]["template"]["spec"]
    return spec


def environment(documents: Iterable[Object]) -> dict[str, str | None]:
    """Returns the environment of the operator's container; None for what the kubelet fills in."""
    (container,) = operator_pod(documents)["containers"]
    return {entry["name"]: entry.get("value") for entry in container["env"]}


def render_each(folder: Path, values: list[Object]) -> list[str]:
    """Render the chart once for each set of values, in one run of helm: as subcharts of a chart made in `folder`.

    Returns the templates' text, notes and CRD left out. The subcharts' names do not show in it.
    """
    names = [f"copy{index:04}" for index in range(len(values))]
    dependencies = [{"name": CHART.name, "alias": name, "version": "*"} for name in names]
    (folder / "charts").mkdir(parents=True)
    (folder / "charts" / CHART.name).symlink_to(CHART)
    about = {"apiVersion": "v2", "name": "copies", "version": "0.0.0", "dependencies": dependencies}
    (folder / "Chart.yaml").write_text(yaml.safe_dump(about))
    (folder / "values.yaml").write_text(yaml.safe_dump(dict(zip(names, values, strict=True))))

    done = run_helm("template", RELEASE, str(folder), "--namespace", NAMESPACE, "--kube-version", "1.36.3")
    assert done.returncode == 0, done.stderr
    texts = dict.fromkeys(names, "")
    for document in re.split(r"^---$", done.stdout, flags=re.MULTILINE):
        source = re.search(r"^# Source: copies/charts/(copy\d{4})/templates/(.*)$", document, flags=re.MULTILINE)
        if source and source[2] != "crd.yaml":
            texts[source[1]] += document.replace(source[1], CHART.name)
    return list(texts.values())
