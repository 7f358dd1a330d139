"""The same run by TRL alone: its trainer, its collator, transformers' own layers. Prints the loss of every step.

    python -P -m finetune_test_models.trl_reference CONFIG.json STEPS WORK      CONFIG.json: a RunConfig

It stops after STEPS steps of the run.

Model, adapter, rows, rates and seed are those of our stages; whatever computes is TRL's SFTTrainer as it comes.
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune_api.run_config import RunConfig
from finetune_kernels.planning.micro_batch import MicroBatch
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.chat.labels import IGNORED
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.data_formatting import DatasetFiles, format_data
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.training_configuration import configure_training
from finetune_trainer.training.engine import Engine
from finetune_trainer.training.losses import supervised_loss
from finetune_trainer.training.optimizer import create_schedule


class _WithOurRates(SFTTrainer):
    """TRL's trainer with our schedule: transformers' begins at a rate of 0."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = create_schedule(self.args, optimizer or self.optimizer, num_training_steps)
        return self.lr_scheduler


class _StopAfter(TrainerCallback):
    """Ends the run after some steps; rates and warm-up stay those of the whole run."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self._steps


def losses(config: RunConfig, steps: int, work: Path) -> list[float]:
    """Losses of the first `steps` steps of TRL's run of `config`."""
    training = config.training
    loaded = load_model(_path(config.model.source), config.model, training.precision, gpus=config.gpus)
    model: Any = inject_adapter(loaded.model, config.adapter, training.seed).model
    encoder = ChatEncoder(loaded.tokenizer, config.dataset.train_on, embedding_rows=loaded.embedding_rows)
    files = DatasetFiles((_path(config.dataset.source),))
    limit = config.model.max_sequence_length
    rows = format_data(files, config.dataset, encoder, work, max_length=limit, seed=training.seed).train

    # Ours in all that decides which rows, rates and roundings a step has; not ours: everything that computes.
    assert training.batch_size is not None
    engine = Engine(False, supervised_loss, MicroBatch(training.batch_size, training.gradient_accumulation or 1))
    ours = configure_training(config, loaded, work / "trl", engine, evaluates=False)
    arguments = SFTConfig(
        **{name: getattr(ours, name) for name in SHARED},
        packing=False,
        padding_free=False,
        max_length=None,
        completion_only_loss=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    completions = [
        {"input_ids": row["input_ids"], "completion_mask": [int(label != IGNORED) for label in row["labels"]]}
        for row in rows
    ]
    trainer = _WithOurRates(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(completions),
        processing_class=loaded.tokenizer,
        callbacks=[_StopAfter(steps)],
    )
    # TRL keeps the adapters of a quantised base in bf16, whatever the precision: small updates are lost (lab notes).
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


SHARED = (
    "output_dir", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "weight_decay", "max_grad_norm", "seed", "data_seed", "bf16",
    "fp16", "use_cpu",
)  # fmt: skip
"""Settings that both sides have."""


def _path(source: str) -> Path:
    return Path(source.removeprefix("file://"))


if __name__ == "__main__":
    found = RunConfig.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(losses(found, int(sys.argv[2]), Path(sys.argv[3]))))
