"""Stage 4: the job's training section in TRL's terms. Pure, but for the paths it is given."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from trl.trainer.sft_config import SFTConfig

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Optimizer, Precision, Scheduler
from finetune_kernels.planning.micro_batch import MicroBatch
from finetune_kernels.primitives.multi_tensor_adamw import MultiTensorAdamW8bit
from finetune_trainer.training.loaded_model import LoadedModel

# transformers renamed the option between the two versions that this code runs on.
_FIELDS = {field.name for field in fields(SFTConfig)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"
OPTIMIZERS = {
    Optimizer.ADAMW_8BIT: "adamw_8bit",
    Optimizer.PAGED_ADAMW_8BIT: "paged_adamw_8bit",
    Optimizer.ADAMW: "adamw_torch",
}
SCHEDULERS = {Scheduler.LINEAR: "linear", Scheduler.COSINE: "cosine", Scheduler.CONSTANT: "constant_with_warmup"}


def configure_training(
    config: RunConfig, loaded: LoadedModel, output: Path, *, evaluates: bool, recompute: bool, batch: MicroBatch
) -> SFTConfig:
    """TRL's configuration of this run. Rows arrive encoded and cut, so TRL only packs them."""
    training = config.training
    packing: dict[str, Any] = {
        "packing": True,
        "packing_strategy": "bfd",
        "max_length": config.model.max_sequence_length,
    }
    if not config.dataset.packing:
        packing = {"packing": False, "padding_free": True, "max_length": None}
    evaluation: dict[str, Any] = {"eval_strategy": "no"}
    if evaluates and training.evaluation_steps is not None:
        evaluation = {"eval_strategy": "steps", "eval_steps": training.evaluation_steps}
    on_gpu = loaded.device.type == "cuda"
    recomputation: dict[str, Any] = {CHECKPOINTING: recompute}
    return SFTConfig(
        output_dir=str(output),
        num_train_epochs=training.resolved_epochs() or 1.0,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=batch.size,
        per_device_eval_batch_size=batch.size,
        gradient_accumulation_steps=batch.accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=SCHEDULERS[training.scheduler],
        warmup_steps=training.warmup_steps,
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
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        save_strategy="steps",
        save_steps=training.checkpoint_steps,
        save_total_limit=1,  # on this disk; S3 keeps more
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},  # copying a batch does not wait for the pass before
        disable_tqdm=True,
        report_to="none",
        dataset_num_proc=None,
        **recomputation,
        **packing,
        **evaluation,
    )


def choose_optimizer(arguments: SFTConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Our optimiser and its options where it stands for the one that `arguments` name."""
    if arguments.optim != OPTIMIZERS[Optimizer.ADAMW_8BIT]:
        return None
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return MultiTensorAdamW8bit, {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon}
