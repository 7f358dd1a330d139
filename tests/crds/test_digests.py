"""Digests: equal for specs that mean the same run, different for those that do not, and kept by later versions."""

from typing import Any

import pytest
from pydantic import create_model

from finetune_api import run_config
from finetune_api.job import FineTuneJob
from finetune_api.run_config import DEFAULTS_VERSION, TRAINED_BY, JobIdentity, RunConfig
from finetune_api.spec.training import TrainingSpec

MINIMAL: dict[str, Any] = {
    "model": {"source": "hf://org/model"},
    "dataset": {"source": "hf://org/data"},
    "output": {"s3": {"bucket": "models"}},
}


def config(**sections: dict[str, Any]) -> RunConfig:
    spec = {name: MINIMAL.get(name, {}) | sections.get(name, {}) for name in MINIMAL.keys() | sections.keys()}
    manifest = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "j"}, "spec": spec}
    job = FineTuneJob.model_validate(manifest)
    return RunConfig.from_spec(JobIdentity(namespace="n", name="j", uid="u"), job.spec, progress=None)


def digests(**sections: dict[str, Any]) -> tuple[str, str]:
    built = config(**sections)
    return built.training_digest(), built.spec_digest()


CHANGES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "a field with its default": ({"training": {"gradientAccumulation": 4}}, False, False),
    "other GGUF files": ({"export": {"gguf": []}}, False, True),
    "no merged weights": ({"export": {"merged": "None"}}, False, True),
    "another bucket": ({"output": {"s3": {"bucket": "others"}}}, False, False),
    "another logging interval": ({"training": {"loggingSteps": 7}}, False, False),
    "other checkpoints": ({"training": {"checkpointSteps": 7}}, False, False),
    "another seed": ({"training": {"seed": 7}}, True, True),
    "another rank": ({"adapter": {"rank": 4}}, True, True),
    "another model": ({"model": {"source": "hf://org/other"}}, True, True),
    "other rows": ({"dataset": {"maxSamples": 7}}, True, True),
}


@pytest.mark.parametrize(("sections", "trains_otherwise", "results_otherwise"), CHANGES.values(), ids=CHANGES)
def test_a_digest_changes_with_what_it_stands_for(
    sections: dict[str, Any], trains_otherwise: bool, results_otherwise: bool
) -> None:
    before, after = digests(), digests(**sections)
    assert [one != other for one, other in zip(before, after, strict=True)] == [trains_otherwise, results_otherwise]


def test_a_field_of_a_later_version_changes_no_digest() -> None:
    built = config(training={"seed": 7})
    later = create_model("Later", __base__=TrainingSpec, later_field=(int, 3))
    for value, same in ((3, True), (4, False)):
        training = later.model_validate(built.training.model_dump() | {"later_field": value})
        with_field = built.model_copy(update={"training": training})
        assert (with_field.training_digest() == built.training_digest()) is same


# The defaults that digests of this version leave out. Whoever changes one raises DEFAULTS_VERSION, and writes it here:
# the same spec then means another run. New fields need no line.
LEFT_OUT: dict[str, Any] = {
    "model.revision": None, "model.max_sequence_length": 2048, "model.quantization": "NF4",
    "model.double_quantization": True, "model.chat_template": None, "model.chat_template_name": None,
    "dataset.split": "train", "dataset.subset": None, "dataset.format": "Auto", "dataset.train_on": "Responses",
    "dataset.packing": True, "dataset.max_samples": None, "dataset.on_bad_row": "Fail", "dataset.evaluation": None,
    "adapter.variant": "LoRA", "adapter.rank": 16, "adapter.alpha": 16.0, "adapter.dropout": 0.0,
    "adapter.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "training.epochs": None, "training.max_steps": None, "training.batch_size": None,
    "training.gradient_accumulation": 4, "training.learning_rate": 0.0002, "training.scheduler": "Linear",
    "training.warmup_steps": None, "training.optimizer": "AdamW8bit", "training.weight_decay": 0.01,
    "training.max_grad_norm": 1.0, "training.neftune_noise_alpha": None, "training.seed": 3407,
    "training.precision": "Auto", "training.memory": "Fastest", "training.evaluation_steps": None,
    "training.early_stopping": None, "training.keep_best": False, "training.samples": None,
    "export.merged": "BF16", "export.gguf": ["Q8_0"],
}  # fmt: skip


def defaults() -> dict[str, Any]:
    """Every default that a digest leaves out, by its path."""
    built = config()
    found: dict[str, Any] = {}
    for name in (*TRAINED_BY, "export"):
        section = getattr(built, name)
        whole = section.model_dump(mode="json", exclude=run_config.NOT_IN_DIGEST.get(name))
        found |= {f"{name}.{key}": value for key, value in whole.items() if key not in section.model_fields_set}
    return found


def test_a_default_changes_only_with_the_version_of_defaults() -> None:
    assert DEFAULTS_VERSION == 1
    found = defaults()
    assert {name: found[name] for name in LEFT_OUT} == LEFT_OUT
