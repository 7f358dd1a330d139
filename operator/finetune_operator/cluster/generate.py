"""`python -m finetune_operator.cluster.generate [--check]`: write the chart's rules from `access.py`.

With --check nothing is written; a stale file is named and the exit status is 1.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from finetune_api.generate import CHECKOUT, write_or_check
from finetune_operator.cluster.access import (
    AUTHORITY_RULES,
    CLUSTER_RULES,
    JOB_SET_RULES,
    OWN_RULES,
    QUEUE_RULES,
    RULES,
    Rule,
)
from finetune_operator.desired.names import LEASE_NAME

FULL_NAME = '{{ include "finetune.fullname" . }}'
"""What the chart calls the release's objects, and with them the Lease."""

HEADER = "{{/* GENERATED from operator/finetune_operator/cluster/access.py by `make generate`. Do not edit. */}}\n"


def generated_files() -> dict[Path, str]:
    """Returns the generated template with its content."""
    templates = {
        "rules": RULES,
        "queueRules": QUEUE_RULES,
        "jobSetRules": JOB_SET_RULES,
        "ownRules": OWN_RULES,
        "authorityRules": AUTHORITY_RULES,
        "clusterRules": CLUSTER_RULES,
    }
    text = HEADER + "".join(_template(f"finetune.{name}", rules) for name, rules in templates.items())
    return {CHECKOUT / "charts/finetune-operator/templates/_rules.tpl": text}


def _template(name: str, rules: Iterable[Rule]) -> str:
    return f'{{{{- define "{name}" -}}}}\n{"".join(map(_entry, rules))}{{{{- end }}}}\n'


def _entry(rule: Rule) -> str:
    """Returns one rule in YAML, below its reason."""
    group = rule.group or '""'
    names = [name.replace(LEASE_NAME, FULL_NAME) for name in rule.names]
    only = f"  resourceNames: [{', '.join(names)}]\n" if names else ""
    return (
        f"# {rule.reason}\n- apiGroups: [{group}]\n  resources: [{rule.resource}]\n{only}"
        f"  verbs: [{', '.join(rule.verbs)}]\n"
    )


if __name__ == "__main__":
    sys.exit(write_or_check(generated_files(), sys.argv[1:]))
