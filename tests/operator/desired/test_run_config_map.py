"""The ConfigMap that hands the run's configuration over, and how it stays up to date."""

import yaml

from finetune_api.run_config import RunConfig
from finetune_operator.desired.run_config_map import RUN_CONFIG_KEY, build_run_config, build_run_config_map
from finetune_operator.observe.children import ChildJob
from finetune_test_operator.snapshot_builder import (
    FULL_SECTIONS,
    METADATA,
    PREFIX,
    TOLD,
    a_snapshot,
    a_spec,
    a_trainer_job,
    decision_about,
)


def test_the_run_config_survives_the_config_map() -> None:
    spec = a_spec(**FULL_SECTIONS)
    config = build_run_config(METADATA, spec, PREFIX, *TOLD)
    written = build_run_config_map(METADATA, config)
    assert RunConfig.from_yaml(written["data"][RUN_CONFIG_KEY]) == config
    assert config.output_prefix == PREFIX
    assert config.progress is not None
    assert config.progress.url == (
        "https://operator:8443/apis/finetune.dev/v1alpha1/namespaces/team/finetunejobs/bot/status"
    )


def test_a_running_job_keeps_the_configuration_that_its_image_knows() -> None:
    snapshot = a_snapshot()
    assert snapshot.config_map is not None
    document = yaml.safe_load(snapshot.config_map["data"]["run_config.yaml"])
    older = document | {"gpus": 0} | {"progress": document["progress"] | {"caCertificate": "OLD"}}
    del older["gpu"]

    def update_of(mounted: dict[str, object], job: ChildJob | None) -> dict[str, object] | None:
        text = {"run_config.yaml": yaml.safe_dump(mounted)}
        kept = {"metadata": snapshot.config_map["metadata"], "data": text}  # type: ignore[index]
        return decision_about(a_snapshot(job=job, config_map=kept)).actions.update_config_map

    assert update_of(older | {"progress": document["progress"]}, a_trainer_job()) is None
    update = update_of(older, a_trainer_job())
    assert update is not None
    assert yaml.safe_load(update["data"]["run_config.yaml"]) == older | {"progress": document["progress"]}  # type: ignore[index]
    assert update_of(older, None) == {"data": snapshot.config_map["data"]}
