"""The administrator's word about what pods carry: defaults for every job, and what a job may set itself.

A user who may create jobs, and nothing else, must not gain rights by a field. An identity, a mirror that gets tokens,
an authority that opens TLS, a label that a policy keys on, a volume that others use: none of these is a job's to choose
until the administrator says so. What is left by default (pull secrets and policy, places) leads nowhere.
"""

from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.spec.pod import EnvName, PodOptions
from finetune_api.spec.spec import FineTuneJobSpec

OverridableField = Literal[
    "labels",
    "annotations",
    "imagePullSecrets",
    "imagePullPolicy",
    "caBundle",
    "gpuProducts",
    "topologySpread",
    "cacheClaim",
]
_MERGED = ("labels", "annotations", "env")


class AllowedOverrides(ApiModel):
    """Fields of spec.pod that a job may set."""

    fields: tuple[OverridableField, ...] = ("imagePullSecrets", "imagePullPolicy", "gpuProducts", "topologySpread")
    """Whole fields."""

    env: tuple[EnvName, ...] = ()
    """Variables of spec.pod.env."""

    service_accounts: tuple[str, ...] = ()
    """Names that spec.pod.serviceAccountName may have; * stands for any characters."""


class PodPolicy(ApiModel):
    """Defaults of an installation, and what its jobs may set otherwise."""

    defaults: PodOptions = Field(default_factory=PodOptions)
    allowed: AllowedOverrides = AllowedOverrides()

    def refuse(self, pod: PodOptions) -> list[str]:
        """Name what a job sets and may not; a field that says what is the default anyway is no difference."""
        wanted, given = pod.to_wire(), self.defaults.to_wire()
        found = []

        for name, value in wanted.items():
            if not value or value == given.get(name):
                continue
            if name == "env":
                found += self._refuse_env(pod)
            elif name == "serviceAccountName":
                if not any(fnmatchcase(value, pattern) for pattern in self.allowed.service_accounts):
                    allowed = ", ".join(self.allowed.service_accounts) or "none"
                    found.append(f"spec.pod.serviceAccountName (allowedOverrides.serviceAccounts: {allowed})")
            elif name not in self.allowed.fields:
                allowed = ", ".join(self.allowed.fields) or "none"
                found.append(f"spec.pod.{name} (allowedOverrides.fields: {allowed})")
        return found

    def apply(self, spec: FineTuneJobSpec) -> FineTuneJobSpec:
        """Return a job's spec whose spec.pod has the defaults where the job sets nothing. Maps are merged by key; of a
        list, the job's stands for the whole."""
        pod = {name: value for name, value in spec.pod.to_wire().items() if value}
        merged = self.defaults.to_wire()
        for name, value in pod.items():
            merged[name] = merged.get(name, {}) | value if name in _MERGED else value
        return spec.model_copy(update={"pod": PodOptions.model_validate(merged)})

    def _refuse_env(self, pod: PodOptions) -> list[str]:
        allowed = ", ".join(self.allowed.env) or "none"
        return [
            f"spec.pod.env.{name} (allowedOverrides.env: {allowed})"
            for name, value in pod.env.items()
            if name not in self.allowed.env and self.defaults.env.get(name) != value
        ]
