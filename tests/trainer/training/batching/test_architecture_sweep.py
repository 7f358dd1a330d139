"""The table that preflight reads agrees with tiny models: a sample of the types; `make architectures` asks them all."""

import pytest

from finetune_api.vocabulary import Batching
from finetune_test_models.sweeps.architecture_sweep import ask, types
from finetune_trainer.model.architectures import UNPACKED

SAMPLE = {
    "a plain decoder": ("qwen3", Batching.PACKED),
    "absolute positions": ("gpt2", Batching.PACKED),
    "experts": ("mixtral", Batching.PACKED),
    "latent attention": ("deepseek_v3", Batching.PACKED),
    "a window": ("gemma3_text", Batching.PACKED),
    "sinks and a mask of its own": ("gpt_oss", Batching.PACKED),
    "biases by distance": ("bloom", Batching.PADDED),
    "positions learned with an offset": ("opt", Batching.PADDED),
    "state space": ("mamba", Batching.PADDED),
    "a hybrid with a delta rule": ("qwen3_next", Batching.PACKED),
    "a hybrid with Mamba": ("granitemoehybrid", Batching.PACKED),
    "a hybrid with shared blocks": ("zamba2", Batching.PADDED),
    "short convolutions and experts": ("lfm2_moe", Batching.PACKED),
    "a recurrence": ("rwkv", Batching.PADDED),
    "an encoder": ("bert", None),
}


@pytest.mark.filterwarnings("ignore")  # families warn of kernels that are not installed
@pytest.mark.parametrize(("model_type", "expected"), SAMPLE.values(), ids=SAMPLE)
def test_documents_are_apart_and_preflight_knows_how(model_type: str, expected: Batching | None) -> None:
    answer = ask(model_type)
    assert answer.batching is expected
    assert answer.is_right, answer.remark
    assert (expected not in (None, Batching.PACKED)) == (model_type in UNPACKED)


def test_the_table_names_only_types_that_exist() -> None:
    assert set(types()) >= UNPACKED
