"""Experts in NF4: stacked parameters are quantised while they are loaded, one expert after the other.

transformers 5 keeps the experts of a layer as parameters of three dimensions, and bitsandbytes quantises linear layers
only. So bitsandbytes' quantiser of transformers is told of these parameters, too: as soon as a layer's experts are
there, each is quantised by itself, and the 16-bit tensors are released before the next layer is read. The weights are
read in the main thread while anything is quantised, so no more than one layer's are in memory.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from finetune_kernels.experts.replacing import replace_experts, stacked_experts, why_not_replaced
from finetune_kernels.experts.routers import keep_routers_in_fp32, router_paths
from finetune_kernels.planning.expert_families import ExpertFamily, expert_family_of_type
from finetune_kernels.primitives.nf4_stack import Nf4Stack
from finetune_trainer.model.configuration.reading import read_published_config
from finetune_trainer.model.expert_files import LAYER
from finetune_trainer.model.layer_weights import known_experts
from finetune_trainer.model.safetensors_header import TensorHeader

log = logging.getLogger(__name__)
METHOD = "nf4_with_experts"
"""Name of our quantiser among transformers'."""


@register_quantization_config(METHOD)
class Nf4WithExperts(BitsAndBytesConfig):
    """bitsandbytes' settings, for a model whose experts are quantised, too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)  # type: ignore[no-untyped-call]
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers takes names of registered ones

    def plain(self) -> BitsAndBytesConfig:
        """The same settings as transformers' own."""
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=self.bnb_4bit_compute_dtype,
        )


@register_quantizer(METHOD)
class ExpertQuantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantiser, which also takes the stacked matrices of experts that our kernels know."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """True for linear layers, and for the experts' matrices."""
        return super().param_needs_quantization(model, param_name, **kwargs) or is_expert_matrix(model, param_name)

    def get_modules_to_not_convert(self, model: Any, *arguments: Any, **named: Any) -> list[str]:  # type: ignore[override]
        """Names of the modules that stay in 16 bits: what transformers leaves out, and the linear layers in routers."""
        found = super().get_modules_to_not_convert(model, *arguments, **named)
        return [*(found or []), *router_paths(model)]

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that ends the loading of a parameter."""
        return _Quantize(self, super().get_quantize_ops())  # type: ignore[no-untyped-call]


class _Quantize(ConversionOps):
    """Quantises experts one by one, and everything else as bitsandbytes does."""

    def __init__(self, quantizer: ExpertQuantizer, linear: Any) -> None:
        self._quantizer, self._linear = quantizer, linear

    def convert(self, input_dict: Any, *arguments: Any, model: Any = None, **named: Any) -> Any:
        """Returns the parameters in NF4 by their names."""
        (name, value), *others = input_dict.items()
        if others or not is_expert_matrix(model, name):
            return self._linear.convert(input_dict, *arguments, model=model, **named)

        whole = value[0] if isinstance(value, list) else value
        family = _family(model)
        assert family is not None
        # Linear layers are [out, in], whatever the family's layout, and so is what bitsandbytes would quantise.
        matrices = (expert.T if family.is_transposed else expert for expert in whole)
        stack = Nf4Stack.of(matrices, double=self._quantizer.quantization_config.bnb_4bit_use_double_quant)

        parameter: Any = nn.Parameter(stack.codes, requires_grad=False)
        parameter.nf4_stack = stack
        module, _ = get_module_from_name(model, name)
        module._is_hf_initialized = True
        return {name: parameter}


def is_expert_matrix(model: Any, name: str) -> bool:
    """True for a parameter of transformers' experts that is a stack of matrices, in a family that the kernels know."""
    family, (path, _, last) = _family(model), name.rpartition(".")
    return family is not None and last in family.weights and type(model.get_submodule(path)).__name__ == family.experts


def adopt_experts(model: Any, headers: Sequence[TensorHeader]) -> None:
    """Puts our experts in place of the loaded model's, whose routers then compute in fp32; says why not, if not.

    `headers` are those of the model's files, by whose names adapters on the experts will be saved.
    """
    config = model.config.quantization_config if hasattr(model.config, "quantization_config") else None
    if isinstance(config, Nf4WithExperts):
        # What follows knows bitsandbytes by its own name.
        model.config.quantization_config = model.hf_quantizer.quantization_config = config.plain()
        model.quantization_method = config.plain().quant_method

    if (reason := why_not_replaced(model)) is not None:
        log.warning("experts stay as transformers computes them, in 16 bits and without adapters: %s", reason)
    elif layers := replace_experts(model):
        keep_routers_in_fp32(model)
        _name_experts(model, headers)
        log.info("experts of %d layers: stacked weights, routers in fp32", layers)


def _name_experts(model: Any, headers: Sequence[TensorHeader]) -> None:
    stored = known_experts(headers, model.config.get_text_config().model_type)
    for path, experts in stacked_experts(model):
        layer = LAYER.search(path)
        experts.stored_experts = stored.get(int(layer[1])) if layer else None
    if not stored:
        log.warning("experts get no adapter: the model's files name them in an unknown way")


def quantization_config(folder: Path, **settings: Any) -> BitsAndBytesConfig:
    """bitsandbytes' settings for NF4, with experts if the model in `folder` has some that the kernels know."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    # A text section without a class of its own is loaded as another family.
    family = expert_family_of_type(read_published_config(folder).model_type)
    # A model in bitsandbytes' form says so itself, and transformers insists on its settings' class.
    written: Any = getattr(config, "quantization_config", None) or {}
    is_packed = dict(written).get("quant_method") == "bitsandbytes"
    kind: Any = Nf4WithExperts if family and not is_packed else BitsAndBytesConfig
    found: BitsAndBytesConfig = kind(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)
    return found


def _family(model: Any) -> ExpertFamily | None:
    return expert_family_of_type(model.config.get_text_config().model_type)
