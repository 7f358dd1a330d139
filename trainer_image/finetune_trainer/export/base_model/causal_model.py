"""Loads transformers' language model from a folder whose files transformers does not load as that: the language model
of a checkpoint that also reads images or sound, and weights that are decoded from FP8 or MXFP4.

Each tensor is read, decoded and, if the model is to be in NF4, quantised before the next one: the checkpoint's other
parts are never in memory, nor is the whole model in 16 bits.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from finetune_kernels.mixers.linear_attention import use_kernels
from finetune_trainer.export.base_model.companions import GENERATION
from finetune_trainer.export.base_model.folder import QUANTIZATION, BaseModel
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor
from finetune_trainer.model.configuration.reading import read_language_model_config
from finetune_trainer.model.description import read_written_config
from finetune_trainer.model.multimodal import is_multimodal


@dataclass(frozen=True)
class _Unread:
    """A tensor that is read when transformers asks for its values, as it asks the safetensors package."""

    tensor: StoredTensor
    device: torch.device

    def __getitem__(self, _: Any) -> torch.Tensor:
        # The bytes go to the device, and are decoded there.
        flat = StoredTensor(
            "", torch.uint8, (self.tensor.size,), self.tensor.path, self.tensor.offset, self.tensor.size
        )
        values = self.tensor.to_values(flat.read().to(self.device))
        return values.contiguous()  # a turned stack is a view, and kernels take rows one behind the other


def load_causal_model(
    base: BaseModel, device: torch.device, dtype: torch.dtype, quantization: Any = None
) -> tuple[Any, Collection[str]]:
    """The language model on `device`, and the names of parameters that the files lack.

    `quantization` are transformers' settings for bitsandbytes. Raises what transformers raises.
    """
    config = read_language_model_config(base.path)
    config.__dict__.pop(QUANTIZATION, None)  # the weights come decoded
    tensors = {tensor.name: _Unread(tensor, device) for tensor in base.tensors}
    model, info = load_from_tensors(config, tensors, base.path, device, dtype, quantization)
    return model, info["missing_keys"]


def load_from_tensors(
    config: Any, tensors: Mapping[str, Any], folder: Path, device: torch.device, dtype: torch.dtype,
    quantization: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The causal language model of `config` with values that are read when they are asked for, and transformers'
    account of names that are missing or not expected. `folder` is the checkpoint that it stands for."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=dtype,
        device_map={"": device},
        output_loading_info=True,
        **({} if quantization is None else {"quantization_config": quantization}),
    )

    # peft reads the config at this path as one of the model's class, which a whole checkpoint's is not.
    model.name_or_path = model.config._name_or_path = "" if is_multimodal(read_written_config(folder)) else str(folder)
    _take_generation_config(model, folder)
    return model, info


def choose_functions(model: Any) -> None:
    """Sets what transformers chooses wrongly by itself. Plain attention for a model whose scores are capped (Gemma 2):
    no other caps them everywhere, and transformers 5.17 takes another, and then leaves the cap out without a word.
    Linear attention by fla's kernels only for tensors of a GPU: transformers takes fla where it can be imported."""
    use_kernels(model)
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")


def _take_generation_config(model: Any, folder: Path) -> None:
    """Give the model the settings of its folder, as loading the folder would."""
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
