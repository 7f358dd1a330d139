"""A job whose disk is too small is refused before it asks for a GPU, with what takes how much."""

from collections.abc import Callable

import pytest

from finetune_api.failures import FailureReason
from finetune_api.run_config import JobIdentity, RunConfig
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_trainer.model.safetensors_header import TensorHeader
from finetune_trainer.preflight.judgements.disk import judge_disk

Builder = Callable[..., RunConfig]
GIBIBYTE = 1 << 30
WEIGHTS = (TensorHeader("model.embed_tokens.weight", "BF16", (1 << 15, 1 << 15), "model.safetensors", 0, 2 * GIBIBYTE),)


def job(storage: str | None, source: str = "hf://acme/tiny") -> RunConfig:
    spec = {
        "model": {"source": source},
        "dataset": {"source": "s3://models/chat.jsonl"},
        "export": {"merged": "BF16", "gguf": ["Q8_0"]},
        "output": {"s3": {"bucket": "models"}},
        "resources": {"ephemeralStorage": storage} if storage else {},
    }
    return RunConfig.from_spec(
        JobIdentity(namespace="a", name="b", uid="c"), FineTuneJobSpec.model_validate(spec), None
    )


def test_too_small_a_disk_is_an_error_at_its_field() -> None:
    (finding,) = judge_disk(job("4Gi"), WEIGHTS, trained=1 << 20, tokens=1 << 20)
    assert (finding.location, finding.reason) == ("spec.resources.ephemeralStorage", FailureReason.DISK_FULL)
    assert "needs 5.1 GiB of disk (base model 2.0 GiB, merged BF16 2.0 GiB, GGUF Q8_0 1.1 GiB" in finding.message
    assert "but has 4.0 GiB" in finding.message


@pytest.mark.parametrize("config", [job("6Gi"), job(None), job("4Gi", source="pvc://claim/tiny/")])
def test_enough_or_unknown_is_no_finding(config: RunConfig) -> None:
    assert not list(judge_disk(config, WEIGHTS, trained=1 << 20, tokens=1 << 20))
