"""A run that leaves every choice to the defaults, for whatever needs a configuration and runs nothing."""

from typing import Any

from finetune_api.run_config import RunConfig


def minimal_run(gpu: dict[str, Any] | None = None, **sections: dict[str, Any]) -> RunConfig:
    """Returns the run with these fields of its sections, such as `training={"batchSize": 1}`. `gpu`: the card that
    preflight estimates for."""
    document: dict[str, Any] = {
        "job": {"namespace": "n", "name": "j", "uid": "u"},
        "model": {"source": "hf://a/b"},
        "dataset": {"source": "s3://data/x.jsonl"},
        "adapter": {},
        "training": {},
        "export": {},
        "output": {"s3": {"bucket": "models"}},
        "outputPrefix": "default/tiny",
        "checkpointsToKeep": 2,
        "terminationGracePeriodSeconds": 60,
        "gpus": 1,
        "gpu": gpu,
    }
    for section, fields in sections.items():
        document[section] |= fields
    return RunConfig.model_validate(document)
