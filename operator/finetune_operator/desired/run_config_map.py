"""The ConfigMap that hands the resolved job over to the trainer."""

from typing import Any

import yaml

from finetune_api.job import ObjectMeta
from finetune_api.progress import progress_path
from finetune_api.run_config import JobIdentity, ProgressTarget, RunConfig
from finetune_api.spec.endpoints import EndpointPolicy
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_operator.desired.names import child_metadata, child_name

RUN_CONFIG_KEY = "run_config.yaml"


def build_run_config(
    job: ObjectMeta,
    spec: FineTuneJobSpec,
    output_prefix: str,
    progress_url: str,
    ca_certificate: str | None,
    endpoints: EndpointPolicy,
) -> RunConfig:
    """Builds the configuration of the run that a job describes. The run writes below `output_prefix` in its bucket,
    reports its progress below `progress_url`, and connects where `endpoints` allows it."""
    target = ProgressTarget(url=progress_url + progress_path(job.namespace, job.name), ca_certificate=ca_certificate)
    identity = JobIdentity(namespace=job.namespace, name=job.name, uid=job.uid)
    return RunConfig.from_spec(identity, spec, target, output_prefix).model_copy(update={"endpoints": endpoints})


def build_run_config_map(job: ObjectMeta, config: RunConfig) -> dict[str, Any]:
    """Builds the ConfigMap that holds the run's configuration as one YAML file."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": child_metadata(job, child_name(job)),
        "data": {RUN_CONFIG_KEY: config.to_yaml()},
    }


def has_heartbeat(config_map: dict[str, Any]) -> bool:
    """True if the trainer that reads this ConfigMap reports regularly, even while nothing changes; those of older
    versions of the operator do not say how often."""
    return "\nstall:\n" in str((config_map.get("data") or {}).get(RUN_CONFIG_KEY, ""))


def follow_progress_target(existing: dict[str, Any], desired: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the patch that brings the progress URL and certificate of a mounted ConfigMap up to date; None if they
    are. The rest of the file stays as it was written for the Job's image, which may be older than this operator."""
    try:
        mounted = yaml.safe_load(existing["data"][RUN_CONFIG_KEY])
        wanted = yaml.safe_load(desired["data"][RUN_CONFIG_KEY])
        if mounted["progress"] == wanted["progress"]:
            return None

        text = yaml.safe_dump(mounted | {"progress": wanted["progress"]}, sort_keys=False, allow_unicode=True)
    except (yaml.YAMLError, KeyError, TypeError):
        return {"data": desired["data"]}  # somebody edited the file so that it cannot be read: replace all of it

    return {"data": {RUN_CONFIG_KEY: text}}
