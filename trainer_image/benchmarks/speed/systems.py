"""Sets up each system as its own documentation says: the same checkpoint, tokens, adapter and optimiser.

Everyone trains through TRL's SFTTrainer on random tokens (token_rows.py), packed by each in its own way where they are
documents, with AdamW 8-bit, rank 16 on seven linears,
in bf16. `import_libraries` can be called long before: importing takes longer than some measurements.
"""

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

from speed.ranks import local_rank
from speed.rows import IN_16_BITS, LINEARS, SEED, Row, working_folder
from speed.token_rows import dataset

OURS = tuple(
    f"finetune_trainer.{name}"
    for name in (
        "stages.adapter_injection", "training.engine", "stages.model_loading", "training.qlora_trainer",
        "stages.training_configuration",
    )
)  # fmt: skip
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
MODES = {
    "ours": {},
    "ours-no-graphs": {},
    "ours-fp8": {"precision": "FP8"},
    "ours-balanced": {"memory": "Balanced"},
    "ours-smallest": {"memory": "Smallest"},
    "ours-smallest-fp8": {"memory": "Smallest", "precision": "FP8"},
}
"""What each of ours has in its training section."""


def import_libraries(system: str) -> None:
    """Import everything that the system needs, in the order that it asks for (Unsloth patches the others)."""
    os.environ |= ENVIRONMENT
    if system == "unsloth-max":
        os.environ["UNSLOTH_GC_KEEP_LAYERS"] = "max"

    first = ["unsloth"] if system.startswith("unsloth") else []
    for name in (*first, "torch", "transformers", "peft", "trl", "datasets", "bitsandbytes"):
        importlib.import_module(name)
    for name in OURS if system in MODES else ():
        importlib.import_module(name)

    # transformers imports a class's module when the class is first asked for.
    for module, name in (
        ("trl", "SFTTrainer"),
        ("transformers", "LlamaForCausalLM"),
        ("transformers", "AutoTokenizer"),
    ):
        getattr(importlib.import_module(module), name)


def build(system: str, row: Row, folder: Path, steps: int) -> Any:
    """The system's trainer, ready to train `steps` steps of `row` on the model below `folder`."""
    import_libraries(system)
    maker = _ours if system in MODES else _unsloth if system.startswith("unsloth") else _hugging_face
    return maker(system, row, folder, steps)


def _options(row: Row, steps: int, *, recompute: bool) -> dict[str, Any]:
    """SFTConfig's fields, the same for every peer."""
    return {
        "output_dir": str(working_folder() / "out"), "max_steps": steps, "per_device_train_batch_size": row.batch,
        "gradient_accumulation_steps": row.accumulation, "learning_rate": 2e-4, "optim": "adamw_8bit", "bf16": True,
        "weight_decay": 0.01, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": SEED,
        "max_length": row.length, "packing": bool(row.mean), "gradient_checkpointing": recompute, "disable_tqdm": True,
        "dataset_num_proc": None, "ddp_find_unused_parameters": False,
    }  # fmt: skip


def _hugging_face(system: str, row: Row, folder: Path, steps: int) -> Any:
    """transformers, TRL and peft alone; `liger` adds its kernels, as far as TRL takes them."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": local_rank()})
    options = _options(row, steps, recompute=system != "hf-no-checkpointing")
    return SFTTrainer(
        model=model, args=SFTConfig(**options, use_liger_kernel=system == "liger"),
        train_dataset=dataset(row, steps), processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM"),
    )  # fmt: skip


def _unsloth(system: str, row: Row, folder: Path, steps: int) -> Any:
    """Unsloth as its documentation sets it up; `unsloth-max` keeps all layers' activations (`import_libraries`)."""
    import torch
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=row.length, dtype=torch.bfloat16, load_in_4bit=True,
        device_map={"": local_rank()},
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=LINEARS, random_state=SEED,
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    options = _options(row, steps, recompute=True)
    del options["gradient_checkpointing"]
    data = dataset(row, steps)
    return SFTTrainer(model=model, args=SFTConfig(**options), train_dataset=data, processing_class=tokenizer)


def _ours(system: str, row: Row, folder: Path, steps: int) -> Any:
    """This project's trainer, as a job runs it, but for FP8's gate."""
    from finetune_trainer.stages.adapter_injection import inject_adapter
    from finetune_trainer.stages.model_loading import load_model
    from finetune_trainer.training.engine import prepare_engine
    from open_gate import open_fp8_gate

    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    open_fp8_gate()
    config = run_config(system, row, folder, steps)
    if row.on_device:
        from speed.models import on_device

        loaded = on_device.load(folder)
    else:
        loaded = load_model(folder, config.model, config.training.precision, gpus=1)
    adapted = inject_adapter(loaded.model, config.adapter, SEED)
    engine = prepare_engine(adapted.model, loaded, config)
    return our_trainer(adapted.model, loaded, engine, config, dataset(row, steps))


def run_config(system: str, row: Row, folder: Path, steps: int) -> Any:
    """Configuration that the operator would hand to the trainer."""
    from finetune_api.run_config import RunConfig

    adapter: dict[str, Any] = {"rank": 16, "alpha": 16}
    if row.model in IN_16_BITS:
        adapter["expertRank"] = 16  # as the peers have it there
    return RunConfig.model_validate(
        {
            "apiVersion": "finetune.dev/v1alpha1", "kind": "RunConfig",
            "job": {"namespace": "bench", "name": "bench", "uid": "bench"},
            "model": {"source": f"file://{folder}", "maxSequenceLength": row.length},
            "dataset": {"source": "file:///none.jsonl", "packing": bool(row.mean)}, "adapter": adapter,
            "training": {
                "maxSteps": steps, "batchSize": row.batch, "gradientAccumulation": row.accumulation,
                **MODES[system], "checkpointSteps": 100_000, "seed": SEED,
            },
            "export": {"merged": "None", "gguf": []}, "output": {"s3": {"bucket": "models"}},
            "outputPrefix": "bench", "checkpointsToKeep": 1,
            "terminationGracePeriodSeconds": 60, "gpus": 1, "graphs": system != "ours-no-graphs",
        }
    )  # fmt: skip


def our_trainer(model: Any, loaded: Any, engine: Any, config: Any, data: Any, output: Path | None = None) -> Any:
    """QloraTrainer for `data`, which writes to `output`; `planned` is the plan's peak in bytes, `engine` the engine."""
    from finetune_trainer.job.progress_tracker import ProgressTracker
    from finetune_trainer.job.stop_signal import StopSignal
    from finetune_trainer.stages.training_configuration import configure_training
    from finetune_trainer.training.callback import RunCallback
    from finetune_trainer.training.checkpointed_state import CheckpointedState
    from finetune_trainer.training.qlora_trainer import QloraTrainer

    arguments = configure_training(config, loaded, output or working_folder() / "out", engine, evaluates=False)
    callback = RunCallback(ProgressTracker(), None, StopSignal(), CheckpointedState(), engine)
    trainer: Any = QloraTrainer(
        model=model, engine=engine, args=arguments, callback=callback, train_dataset=data,
        processing_class=loaded.tokenizer,
    )  # fmt: skip
    trainer.planned, trainer.engine = engine.plan.peak_bytes if engine.plan else None, engine
    return trainer
