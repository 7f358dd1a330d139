"""The ConfigMap that hands the resolved job over to the pods of one Job.

It never changes: its name ends in the digest of its data, and a Job names the one that it was made for. So the file
always fits the image that reads it, whatever the operator is upgraded to meanwhile, and the operator needs no right to
change ConfigMaps. A Job that was created before the operator's address or certificate changed keeps the old ones: its
progress is not shown then, but its result is read from its termination message as ever.
"""

from functools import lru_cache
from typing import Any

import yaml

from finetune_api.gpus import to_bytes
from finetune_api.job import ObjectMeta
from finetune_api.progress import progress_path
from finetune_api.run_config import GpuHourPrice, JobIdentity, ProgressTarget, RunConfig
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_operator.desired.installation import Installation
from finetune_operator.desired.names import child_metadata, config_map_name

RUN_CONFIG_KEY = "run_config.yaml"
REMEMBERED = 1000
"""ConfigMaps whose text is remembered as read: it never changes, and reading YAML took a third of the operator's time
where 200 jobs reported each second. About 3 kB each."""


def build_run_config(
    job: ObjectMeta, spec: FineTuneJobSpec, output_prefix: str, installation: Installation
) -> RunConfig:
    """Builds the configuration of the run that a job describes. The run writes below `output_prefix` in its bucket."""
    identity = JobIdentity(namespace=job.namespace, name=job.name, uid=job.uid)
    spec = installation.pods.apply(spec)
    config = RunConfig.from_spec(identity, spec, _progress_target(job, installation), output_prefix)
    price = installation.prices.find(spec.resources) if installation.prices else None
    given = {
        "memory_bytes": to_bytes(spec.resources.memory),
        "endpoints": installation.endpoints,
        "log_format": installation.log_format,
        "price": GpuHourPrice(currency=price.currency, per_hour=price.per_hour) if price else None,
    }
    return config.model_copy(update=given)


def build_run_config_map(
    job: ObjectMeta, spec: FineTuneJobSpec, output_prefix: str, installation: Installation
) -> dict[str, Any]:
    """Builds the ConfigMap that holds the run's configuration as one YAML file."""
    data = {RUN_CONFIG_KEY: build_run_config(job, spec, output_prefix, installation).to_yaml()}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": child_metadata(job, config_map_name(job, data)),
        "immutable": True,
        "data": data,
    }


def has_heartbeat(config_map: dict[str, Any]) -> bool:
    """True if the trainer that reads this ConfigMap reports regularly, even while nothing changes; those of older
    versions of the operator do not say how often."""
    return "\nstall:\n" in str((config_map.get("data") or {}).get(RUN_CONFIG_KEY, ""))


def reports_elsewhere(config_map: dict[str, Any], job: ObjectMeta, installation: Installation) -> bool:
    """True if the pods that mount a ConfigMap report to another address, or trust another certificate, than the
    operator has now."""
    try:
        mounted = _mounted_target(config_map["data"][RUN_CONFIG_KEY])
    except (KeyError, TypeError):
        return False
    return mounted is not None and mounted != _progress_target(job, installation)


@lru_cache(maxsize=REMEMBERED)
def _mounted_target(run_config: str) -> ProgressTarget | None:
    """Reads where a run reports; None if another version wrote it, of which nothing is known."""
    try:
        return ProgressTarget.model_validate(yaml.safe_load(run_config)["progress"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def _progress_target(job: ObjectMeta, installation: Installation) -> ProgressTarget:
    url = installation.progress_url + progress_path(job.namespace, job.name)
    return ProgressTarget(url=url, ca_certificate=installation.ca_certificate)
