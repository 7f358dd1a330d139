"""Asks a tiny model of every causal language model type of transformers whether its adapters can be merged.

`make architectures` prints the types where what preflight tells from the files differs from what the trainer finds in
the loaded model, and fails if there is one.
"""

import logging
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from finetune_api.spec.training import ALL_LINEAR, DEFAULT_TARGETS, AdapterSpec
from finetune_test_models.sweeps.architecture_sweep import types
from finetune_test_models.tiny_architectures import tiny_architecture
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.errors import ExportError
from finetune_trainer.export.feasibility import check_adapter
from finetune_trainer.export.planned_merge import check_stored_types, check_targets
from finetune_trainer.model.architectures import why_no_decoder
from finetune_trainer.model.layer_weights import RENAMED_TYPES
from finetune_trainer.model.weight_files import list_weights_below
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.expert_loading import adopt_experts


@dataclass(frozen=True)
class MergeAnswer:
    """What is said against merging adapters of one model; None: nothing."""

    trainer: str | None
    preflight: str | None

    @property
    def agrees(self) -> bool:
        """True if preflight says what the trainer says."""
        return (self.trainer is None) == (self.preflight is None)


def write_model(model_type: str, folder: Path) -> bool:
    """Write a tiny model; returns false if the type has no language model of its own that can be trained."""
    if why_no_decoder(model_type) or CONFIG_MAPPING[model_type]().get_text_config().model_type != model_type:
        return False
    tiny_architecture(model_type).to(torch.bfloat16).save_pretrained(folder)
    return True


def ask(model_type: str, folder: Path, targets: tuple[str, ...]) -> MergeAnswer | None:
    """Both answers about adapters on `targets` of the model in `folder`; None if it has no such layers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    adopt_experts(model, list_weights_below(folder))
    try:
        adapted = inject_adapter(model, AdapterSpec(target_modules=targets), 0).model
    except TrainerError:
        return None

    return MergeAnswer(
        _refusal(lambda: check_adapter(adapted, open_base_model(folder))),
        _refusal(lambda: _plan(model_type, folder, targets)),
    )


def _plan(model_type: str, folder: Path, targets: tuple[str, ...]) -> None:
    stored = list_weights_below(folder)
    check_targets(model_type, targets, None if model_type in RENAMED_TYPES else stored)
    check_stored_types(stored)


def _refusal(check: Any) -> str | None:
    try:
        check()
    except ExportError as error:
        return error.message
    return None


def main() -> None:
    """Print every type and list of targets about which the two disagree; exit with 1 if there is one."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    set_verbosity_error()  # type: ignore[no-untyped-call]
    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)

    asked, wrong = 0, 0
    for model_type in sys.argv[1:] or types():
        with tempfile.TemporaryDirectory() as made:
            if not write_model(model_type, Path(made)):
                continue
            for targets in (DEFAULT_TARGETS, (ALL_LINEAR,)):
                answer = ask(model_type, Path(made), targets)
                asked += answer is not None
                if answer is not None and not answer.agrees:
                    wrong += 1
                    print(
                        f"{model_type:<26} WRONG {targets[0]} trainer: {answer.trainer} preflight: {answer.preflight}"
                    )
    print(f"merges: {asked} asked, {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
