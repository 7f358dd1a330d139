"""Settings of the operator, read once at the start from the environment and the command line.

No other module of the operator reads the environment. Wrong settings are collected, so that one start names them all.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import ValidationError

from finetune_api.cost.prices import PriceTable
from finetune_api.logs.formats import LogFormat
from finetune_api.spec.endpoints import EndpointPolicy
from finetune_api.spec.location import DEFAULT_TEMPLATE, LocationTemplate
from finetune_api.spec.pod_policy import PodPolicy
from finetune_operator.errors import SettingsError

LOG_LEVELS = ("INFO", "DEBUG", "WARNING", "ERROR")
SYSTEM_NAMESPACES = ("kube-system", "kube-public", "kube-node-lease")
"""Namespaces of Kubernetes itself, in which no user's job belongs."""

_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class ServiceAccount:
    """API server as a pod reaches it, under the operator's own service account."""

    host: str
    port: int
    folder: Path
    """Holds token and ca.crt."""

    def __str__(self) -> str:
        return f"service account {self.folder}"


@dataclass(frozen=True)
class Kubeconfig:
    """API server of a kubeconfig's context, for an operator outside the cluster."""

    path: Path
    context: str | None
    """None: the file's current context."""

    def __str__(self) -> str:
        return f"kubeconfig {self.path}" + (f", context {self.context}" if self.context else "")


@dataclass(frozen=True)
class OwnTls:
    """Ingredients of a certificate that the operator makes for its progress server itself."""

    seed: Path
    """File of a secret that every replica has, and from which the authority follows."""

    names: tuple[str, ...]
    """Host names and addresses under which the progress server is reached, that of `progress_url` among them."""

    config_map: str
    """Name of the ConfigMap, in the Lease's namespace, that shows the authority; empty: none does."""


@dataclass(frozen=True)
class Settings:
    """Choices of one installation."""

    namespaces: tuple[str, ...]
    """The namespaces that are served; empty serves all."""

    denied_namespaces: tuple[str, ...]
    """Namespaces whose jobs are refused."""

    endpoints: EndpointPolicy
    """Addresses that trainers may connect to."""

    trainer_image: str
    location_template: LocationTemplate
    """Where in its bucket a job writes, below `spec.output.s3.prefix`."""

    progress_url: str
    """Base URL under which trainer pods reach the progress server, without a trailing slash."""

    progress_port: int
    health_port: int
    tls_dir: Path
    """Holds tls.crt and tls.key of the progress server, and ca.crt, the authority that pods trust (absent for a
    public one)."""

    own_tls: OwnTls | None
    """None: somebody else puts the files there."""

    lease_namespace: str
    """Namespace of the Lease by which the replicas elect their leader."""

    lease_name: str
    """Name of that Lease: each installation of a namespace has its own."""

    pod_ip: str
    """Address at which other replicas reach this one's progress server."""

    api_server: ServiceAccount | Kubeconfig
    prices: PriceTable | None
    """Prices of GPUs; None: nothing is said about cost."""

    kueue: bool
    """Whether the operator has rights on Kueue's objects."""

    queue_preflight: bool
    """Whether preflight's Job waits in its job's queue too."""

    job_sets: bool
    """Whether the operator has rights on JobSets."""

    pods: PodPolicy
    """What pods carry, and what a job may set of it."""

    max_gpus_per_namespace: int | None
    """GPUs that the jobs of one namespace may hold at a time; None: as many as there are."""

    log_level: str
    log_format: LogFormat
    """Form of the log lines of the operator and of its jobs' pods."""

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, kubeconfig: Kubeconfig | None = None
    ) -> Self:
        """Read the environment; raises SettingsError that names everything missing or wrong at once.

        With `kubeconfig`, the variables that describe a pod and its service account are not needed.
        """
        reader = _Reader(os.environ if environment is None else environment)

        namespaces = reader.namespaces("FINETUNE_NAMESPACES", ())
        api_server = kubeconfig or reader.service_account()
        settings = cls(
            namespaces=namespaces,
            denied_namespaces=reader.namespaces("FINETUNE_DENIED_NAMESPACES", () if namespaces else SYSTEM_NAMESPACES),
            endpoints=reader.endpoints(api_server),
            trainer_image=reader.text("FINETUNE_TRAINER_IMAGE"),
            location_template=reader.location_template("FINETUNE_RESULT_LOCATION"),
            progress_url=reader.https_url("FINETUNE_PROGRESS_URL"),
            progress_port=reader.port("FINETUNE_PROGRESS_PORT"),
            health_port=reader.port("FINETUNE_HEALTH_PORT"),
            tls_dir=Path(reader.text("FINETUNE_TLS_DIR")),
            own_tls=reader.own_tls(),
            lease_namespace=reader.text("FINETUNE_LEASE_NAMESPACE", "default" if kubeconfig else None),
            lease_name=reader.text("FINETUNE_LEASE_NAME", "finetune-operator"),
            pod_ip=reader.text("FINETUNE_POD_IP", "127.0.0.1" if kubeconfig else None),
            api_server=api_server,
            prices=reader.prices("FINETUNE_PRICES"),
            kueue=reader.flag("FINETUNE_KUEUE"),
            queue_preflight=reader.flag("FINETUNE_QUEUE_PREFLIGHT"),
            job_sets=reader.flag("FINETUNE_JOB_SETS"),
            pods=reader.pods("FINETUNE_POD_DEFAULTS", "FINETUNE_ALLOWED_OVERRIDES"),
            max_gpus_per_namespace=reader.limit("FINETUNE_MAX_GPUS_PER_NAMESPACE"),
            log_level=reader.choice("FINETUNE_LOG_LEVEL", LOG_LEVELS),
            log_format=reader.log_format("FINETUNE_LOG_FORMAT"),
        )

        if reader.errors:
            raise SettingsError("; ".join(reader.errors))
        return settings


class _Reader:
    """Reads variables and collects their mistakes."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self.errors: list[str] = []

    def text(self, name: str, default: str | None = None) -> str:
        value = self._environment.get(name, default)
        if value is None or (value == "" and default is None):
            self.errors.append(f"{name} is not set")
            return ""
        return value

    def namespaces(self, name: str, default: tuple[str, ...]) -> tuple[str, ...]:
        """Names between commas; `default` if the variable is not set."""
        if name not in self._environment:
            return default
        found = tuple(filter(None, (part.strip() for part in self._environment[name].split(","))))
        if wrong := [part for part in found if not _NAMESPACE.fullmatch(part)]:
            self.errors.append(f"{name} must be names of namespaces between commas, found {wrong[0]!r}")
        return found

    def endpoints(self, api_server: ServiceAccount | Kubeconfig) -> EndpointPolicy:
        hosts = self.text("FINETUNE_ENDPOINT_HOSTS", "")
        return EndpointPolicy(
            hosts=tuple(filter(None, (part.strip() for part in hosts.split(",")))),
            private=self.choice("FINETUNE_ENDPOINT_PRIVATE", ("true", "false")) == "true",
            loopback=self.flag("FINETUNE_ENDPOINT_LOOPBACK"),
            api_server=f"{api_server.host}:{api_server.port}" if isinstance(api_server, ServiceAccount) else None,
        )

    def flag(self, name: str) -> bool:
        """True or false; false is the default."""
        return self.choice(name, ("false", "true")) == "true"

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """One of `choices`, the first of which is the default."""
        value = self.text(name, choices[0])
        if value not in choices:
            self.errors.append(f"{name} must be one of {', '.join(choices)}, found {value!r}")
        return value

    def prices(self, name: str) -> PriceTable | None:
        """A table in JSON; None if there is none, or if it has no price."""
        value = self.text(name, "")
        try:
            table = PriceTable.parse(value) if value else None
        except ValueError as error:
            self.errors.append(f"{name} is no price table: {error}")
            return None
        return table if table is not None and table.gpus else None

    def log_format(self, name: str) -> LogFormat:
        value = self.choice(name, tuple(LogFormat))
        return LogFormat(value) if value in tuple(LogFormat) else LogFormat.TEXT

    def location_template(self, name: str) -> LocationTemplate:
        value = self.text(name, DEFAULT_TEMPLATE.text)
        try:
            return LocationTemplate(value)
        except ValueError as error:
            self.errors.append(f"{name} is no layout of a bucket, found {value!r}: {error}")
            return DEFAULT_TEMPLATE

    def pods(self, defaults: str, allowed: str) -> PodPolicy:
        """Two objects in JSON, as the chart's values have them."""
        given = {"defaults": self._json(defaults), "allowed": self._json(allowed)}
        try:
            return PodPolicy.model_validate({name: value for name, value in given.items() if value})
        except ValidationError as error:
            found = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
            names = {"defaults": "podDefaults", "allowed": "allowedOverrides"}
            self.errors += [
                f"{names[place.partition('.')[0]]}{place.removeprefix(place.partition('.')[0])}: {message}"
                for place, message in found
            ]
            return PodPolicy()

    def _json(self, name: str) -> object:
        value = self.text(name, "")
        try:
            return json.loads(value) if value else None
        except ValueError as error:
            self.errors.append(f"{name} is no JSON: {error}")
            return None

    def limit(self, name: str) -> int | None:
        """A whole number from 1; None if there is none, or 0."""
        value = self.text(name, "0")
        if value and not value.isdigit():
            self.errors.append(f"{name} must be a whole number, 0 for no limit, found {value!r}")
            return None
        return int(value or 0) or None

    def port(self, name: str) -> int:
        value = self.text(name)
        if value.isdigit() and 0 < int(value) < 65536:
            return int(value)
        if value:
            self.errors.append(f"{name} must be a port (1 to 65535), found {value!r}")
        return 0

    def own_tls(self) -> OwnTls | None:
        seed = self.text("FINETUNE_TLS_SEED", "")
        if not seed:
            return None
        names = [part.strip() for part in self.text("FINETUNE_TLS_NAMES", "").split(",")]
        host = urlsplit(self._environment.get("FINETUNE_PROGRESS_URL", "")).hostname or ""
        found = tuple(dict.fromkeys(name for name in (host, *names) if name))
        return OwnTls(Path(seed), found, self.text("FINETUNE_AUTHORITY_CONFIG_MAP", ""))

    def https_url(self, name: str) -> str:
        value = self.text(name)
        parts = urlsplit(value)
        if value and (parts.scheme != "https" or not parts.hostname):
            self.errors.append(f"{name} must be an https URL, found {value!r}")
        return value.rstrip("/")

    def service_account(self) -> ServiceAccount:
        return ServiceAccount(
            host=self.text("KUBERNETES_SERVICE_HOST"),
            port=self.port("KUBERNETES_SERVICE_PORT"),
            folder=Path(self.text("FINETUNE_SERVICE_ACCOUNT_DIR")),
        )
