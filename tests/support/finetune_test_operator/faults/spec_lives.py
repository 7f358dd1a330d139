"""Tries what users may write: a job is created as edited and mended, another one is edited and mended again."""

import json
from dataclasses import dataclass
from typing import Any, Final

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from finetune_api.base import Json
from finetune_api.vocabulary import JOB_NAME_LABEL
from finetune_test_operator.faults.bench import Bench
from finetune_test_operator.faults.lives import patience
from finetune_test_operator.faults.spec_plans import SpecPlan

MAX_REFUSAL: Final = 2_000
"""Characters of a refusal that a person can read, without the value that it quotes."""

DISAGREEMENTS: Final = {"ChildRejected", "InvalidConfiguration", "PermissionDenied"}
"""Reasons that say: the API server has taken a job with which the operator can do nothing."""


@dataclass
class SpecTrial:
    """Tries plans in a bench's namespace."""

    bench: Bench
    spec: Json
    """A spec with every field."""

    def __post_init__(self) -> None:
        self._api: Any = client.CustomObjectsApi(self.bench.stage.jobs.cluster.api_client())
        self._place = ("finetune.dev", "v1alpha1", self.bench.stage.jobs.namespace, "finetunejobs")

    def run(self, number: int, plan: SpecPlan) -> list[str]:
        """Try a plan; returns what is wrong, a sentence each. Every second one skips preflight, so both Jobs are met
        by edits of each kind."""
        policy = self.spec["runPolicy"] | {"preflight": "Skip" if number % 2 else "Run"}
        good = self.spec | {"runPolicy": policy}
        if plan.path[0] != "scheduling":
            good |= {"scheduling": {}}  # no Kueue runs here, and without it a job in a queue gets no Job
        edited = plan.apply(good)
        return [
            f"{plan.name}: {each}"
            for name, specs in ((f"spec-{number:04}", (edited, good)), (f"edit-{number:04}", (good, edited, good)))
            for each in self._live(name, plan, specs, good)
        ]

    def _live(self, name: str, plan: SpecPlan, specs: tuple[Json, ...], good: Json) -> list[str]:
        """Create a job with the first spec and give it the others, one after the other."""
        found, exists = [], False
        for spec in specs:
            try:
                self._write(name, spec, exists)
                exists = True
            except ApiException as error:
                found += judge_refusal(error, plan)
                if not exists:
                    return found if spec is not good else [f"a good spec is refused: {error.body}"]
            found += self._converge(name)

        if not found:
            self._api.delete_namespaced_custom_object(*self._place, name)
        return found

    def _write(self, name: str, spec: Json, exists: bool) -> None:
        body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
        strict = {"field_validation": "Strict"}
        if not exists:
            self._api.create_namespaced_custom_object(*self._place, body, **strict)
            return

        version = self._api.get_namespaced_custom_object(*self._place, name)["metadata"]["resourceVersion"]
        body["metadata"] = {"name": name, "resourceVersion": version}
        try:
            self._api.replace_namespaced_custom_object(*self._place, name, body, **strict)
        except ApiException as error:
            if error.status != 409:
                raise
            self._write(name, spec, exists)  # the operator wrote its status meanwhile

    def _converge(self, name: str) -> list[str]:
        informer = self.bench.stage.informer
        generation = self._api.get_namespaced_custom_object(*self._place, name)["metadata"]["generation"]

        def is_seen() -> bool:
            return bool(self.bench.stage.status(name).get("observedGeneration") == generation)

        try:
            informer.wait_for(is_seen, f"{name}: generation {generation} is looked at", patience())
        except TimeoutError as error:
            return [str(error)]
        conditions = self.bench.stage.status(name).get("conditions", [])
        wrong = [each for each in conditions if each["reason"] in DISAGREEMENTS]
        return [f"it was accepted, and the operator says {each['reason']}: {each['message']}" for each in wrong[:1]]


def judge_refusal(error: ApiException, plan: SpecPlan) -> list[str]:
    """What is wrong with what the API server says to an edit, a sentence each."""
    message = str(json.loads(error.body)["message"]) if error.body else ""
    if error.status not in (400, 422):
        return [f"answered with {error.status}: {message[:200]}"]

    # A rule that has no words of its own is quoted as code.
    found = ["says no more than the code of a rule"] if "failed rule:" in message else []
    words = [step for step in plan.path if not step.isdigit()]
    if not any(word in message for word in words):
        found.append("does not name the place")
    shown = message.replace(str(plan.value), "...") if plan.value not in (None, "") else message
    if len(shown) > MAX_REFUSAL:
        found.append(f"has {len(shown)} characters")
    return [f"the refusal {each}: {message[:300]!r}" for each in found]


def left_children(bench: Bench) -> list[Json]:
    """Children in a namespace whose jobs are all deleted."""
    kinds = ("jobs", "configmaps", "pods")
    found = [each for kind in kinds for each in bench.stage.informer.find(kind, {})]
    return [each for each in found if JOB_NAME_LABEL in (each["metadata"].get("labels") or {})]
