"""The ConfigMap that hands the resolved job over to the trainer."""

from typing import Any

from finetune_api.job import ObjectMeta
from finetune_api.progress import progress_path
from finetune_api.run_config import JobIdentity, ProgressTarget, RunConfig
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.desired.names import child_metadata, child_name

RUN_CONFIG_KEY = "run_config.yaml"


def build_run_config(
    job: ObjectMeta, spec: FineTuneJobSpec, progress_url: str, ca_certificate: str | None
) -> RunConfig:
    """The run that a job describes, reporting to the operator below `progress_url`."""
    target = ProgressTarget(url=progress_url + progress_path(job.namespace, job.name), ca_certificate=ca_certificate)
    return RunConfig.from_spec(JobIdentity(namespace=job.namespace, name=job.name, uid=job.uid), spec, target)


def build_run_config_map(job: ObjectMeta, config: RunConfig) -> dict[str, Any]:
    """The ConfigMap with the run as one YAML file."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": child_metadata(job, child_name(job)),
        "data": {RUN_CONFIG_KEY: config.to_yaml()},
    }
