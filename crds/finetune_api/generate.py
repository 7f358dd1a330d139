"""`python -m finetune_api.generate [--check]`: write the CRD, for kubectl and for the chart, from the models.

With --check nothing is written; stale files are named and the exit status is 1.
"""

import sys
from pathlib import Path

import yaml

from finetune_api import GROUP, PLURAL
from finetune_api.definition import custom_resource_definition

CHECKOUT = Path(__file__).parents[2]
HEADER = "# GENERATED from crds/finetune_api by `make generate`. Do not edit.\n"
KEEP = "  {{- if .Values.crds.keep }}\n  annotations:\n    helm.sh/resource-policy: keep\n  {{- end }}\n"


class _Dumper(yaml.SafeDumper):
    """Plain YAML without anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def generated_files() -> dict[Path, str]:
    """Every generated file with its content."""
    text = yaml.dump(custom_resource_definition(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    if "{{" in text:
        raise ValueError("the CRD holds '{{', which helm would read as a template")
    # Uninstalling the chart must not delete everybody's jobs, so the chart's copy is kept.
    kept = text.replace("metadata:\n", "metadata:\n" + KEEP, 1)
    chart_text = f"{HEADER}{{{{- if .Values.crds.enabled }}}}\n{kept}{{{{- end }}}}\n"
    return {
        CHECKOUT / f"crds/{GROUP}_{PLURAL}.yaml": HEADER + text,
        CHECKOUT / "charts/finetune-operator/templates/crd.yaml": chart_text,
    }


def write_or_check(files: dict[Path, str], arguments: list[str]) -> int:
    """Write the files that are stale, or only name them if `arguments` has --check; returns the exit status."""
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]

    if "--check" in arguments:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(CHECKOUT)} is stale: run `make generate`\n")
        return 1 if stale else 0

    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path])
        sys.stdout.write(f"wrote {path.relative_to(CHECKOUT)}\n")
    return 0


def main(arguments: list[str]) -> int:
    """Write or check the CRD's files; returns the exit status."""
    return write_or_check(generated_files(), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
