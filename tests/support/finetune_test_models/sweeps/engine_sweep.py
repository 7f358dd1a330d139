"""Builds the engine of a GPU run for a tiny model of every causal language model type that trains.

On the CPU, without a pass: whatever reads a model's structure before its first step must know every structure. `make
architectures` runs it for all types, and fails for one that no engine can be built for.
"""

import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from finetune_api.spec.training import ALL_LINEAR, AdapterSpec
from finetune_api.vocabulary import Precision
from finetune_kernels.layers.supervised_loss import causal_model
from finetune_kernels.planning.fused_support import PLAIN_ATTENTION
from finetune_kernels.planning.rates import Rates
from finetune_kernels.streaming.host_layers import HostLayers
from finetune_test_models.minimal_run import minimal_run
from finetune_test_models.sweeps.family_table import be_quiet
from finetune_test_models.tiny_architectures import tiny_architecture
from finetune_trainer.distributed.world import ALONE
from finetune_trainer.model.family_table import model_families
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.training import engine
from finetune_trainer.training.loaded_model import DTYPES
from finetune_trainer.training.memory.room import Room

CARD = Room(base=0, total=80 * 2**30, host=64 * 2**30, rates=Rates(products=3e14, decoding=6e11, copying=2e10))


def build_engine(model_type: str, precision: Precision = Precision.BF16) -> engine.Engine:
    """Return the engine that a run of a tiny model would have on a card of 80 GiB.

    Raises AssertionError if its attention is not what the memory plan takes it for.
    """
    model = tiny_architecture(model_type).to(DTYPES[precision])
    adapted = inject_adapter(model, AdapterSpec(target_modules=(ALL_LINEAR,), rank=2), seed=0).model
    return put_engine_into(adapted, precision)


def put_engine_into(model: Any, precision: Precision = Precision.BF16) -> engine.Engine:
    """Return the engine that a peft model would have on such a card; its kernels are in the model."""
    model_type = causal_model(model).config.model_type
    loaded: Any = SimpleNamespace(
        device=torch.device("cuda"), precision=precision, dtype=DTYPES[precision], architecture=model_type, window=None,
        streamed=HostLayers([]),
    )  # fmt: skip
    with (
        mock.patch.object(Room, "measured", return_value=CARD),
        mock.patch.object(engine, "calibrated", return_value=CARD),
    ):
        chosen = engine._choose_engine(model, loaded, minimal_run(), ALONE)

    if chosen.layers is None:
        keeps_scores = model.config._attn_implementation == "eager"
        assert keeps_scores == (model_type in PLAIN_ATTENTION), f"plain attention: {keeps_scores}"
    return chosen


def main() -> None:
    """Print every type that fails; exit with 1 if there is one."""
    be_quiet()
    asked = sys.argv[1:] or [name for name, family in model_families().items() if family.refused is None]
    failed = 0
    for model_type in asked:
        try:
            build_engine(model_type)
        except Exception as error:  # noqa: BLE001  # every architecture may fail in a way of its own
            failed += 1
            print(f"{model_type:<26} FAILS on a GPU: {type(error).__name__}: {error}", flush=True)
    print(f"engines: {len(asked)} built, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
