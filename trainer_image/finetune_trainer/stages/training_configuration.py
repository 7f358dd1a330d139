"""Stage 4: translates the job's training section into TRL's configuration."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.training_args import OptimizerNames
from trl.trainer.sft_config import SFTConfig

from finetune_api.run_config import RunConfig
from finetune_api.spec.training import TrainingSpec
from finetune_api.vocabulary import Batching, Optimizer, Precision, Scheduler
from finetune_trainer.training.engine import Engine
from finetune_trainer.training.loaded_model import LoadedModel

# transformers 5.23 renamed the option; this code also runs on 5.17.
_FIELDS = {field.name for field in fields(SFTConfig)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"
OPTIMIZERS = {
    Optimizer.ADAMW_8BIT: OptimizerNames.ADAMW_8BIT,
    Optimizer.PAGED_ADAMW_8BIT: OptimizerNames.PAGED_ADAMW_8BIT,
    Optimizer.ADAMW: OptimizerNames.ADAMW_TORCH,
}
SCHEDULERS = {Scheduler.LINEAR: "linear", Scheduler.COSINE: "cosine", Scheduler.CONSTANT: "constant"}


def configure_training(
    config: RunConfig, loaded: LoadedModel, output: Path, engine: Engine, *, evaluates: bool
) -> SFTConfig:
    """Returns TRL's configuration of the run, with checkpoints below `output`.

    `evaluates`: there are rows to evaluate on.
    """
    training, batch = config.training, engine.batch
    on_gpu = loaded.device.type == "cuda"
    recomputation: dict[str, Any] = {CHECKPOINTING: engine.recompute_activations}

    return SFTConfig(
        output_dir=str(output),
        num_train_epochs=training.resolved_epochs() or 1.0,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=batch.size,
        per_device_eval_batch_size=batch.size,
        gradient_accumulation_steps=batch.accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=SCHEDULERS[training.scheduler],
        lr_scheduler_kwargs={"warmup_steps": training.warmup_steps},  # of our own schedule: see optimizer.py
        optim=OPTIMIZERS[training.optimizer],
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        neftune_noise_alpha=training.neftune_noise_alpha,
        seed=training.seed,
        data_seed=training.seed,
        bf16=loaded.precision is Precision.BF16,
        fp16=loaded.precision is Precision.FP16,
        use_cpu=not on_gpu,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # NaN must reach our callback, which ends the run
        save_strategy="steps",
        save_steps=training.checkpoint_steps,
        save_total_limit=1,  # on this disk; S3 keeps more
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},  # a copy of the next batch overlaps the pass before
        disable_tqdm=True,
        report_to="none",
        dataset_num_proc=None,
        **recomputation,
        **_packing(config, engine.batching.kind),
        **_evaluation(training, evaluates=evaluates),
    )


def _packing(config: RunConfig, batching: Batching) -> dict[str, Any]:
    """Options for rows that arrive encoded and cut: TRL packs them, or leaves them to our collator as they are."""
    if not config.dataset.packing or batching is not Batching.PACKED:
        return {"packing": False, "padding_free": True, "max_length": None}
    # bfd: best fit, decreasing. It never splits a row.
    return {"packing": True, "packing_strategy": "bfd", "max_length": config.model.max_sequence_length}


def _evaluation(training: TrainingSpec, *, evaluates: bool) -> dict[str, Any]:
    """Options for evaluations during training; the one at the end is ours (training.py)."""
    if not evaluates or training.evaluation_steps is None:
        return {"eval_strategy": "no"}
    return {"eval_strategy": "steps", "eval_steps": training.evaluation_steps}
