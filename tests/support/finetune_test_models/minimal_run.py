"""A run that leaves every choice to the defaults, and a model to plan it for, for whatever needs a configuration and
runs nothing."""

from types import SimpleNamespace
from typing import Any

from finetune_api.run_config import RunConfig

LLAMA_70B = SimpleNamespace(
    model_type="llama",
    hidden_act="silu",
    num_hidden_layers=80,
    hidden_size=8192,
    num_attention_heads=64,
    num_key_value_heads=8,
    intermediate_size=28672,
    vocab_size=128_256,
    tie_word_embeddings=False,
)
"""What memory plans read of Llama 3.3 70B's config.json."""


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
