"""Stage 1: loads the base model, frozen, in 4 or 16 bits, and its tokenizer.

Only safetensors weights and architectures of transformers itself are loaded; a repository's own code never runs.
"""

import logging
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import Precision, Quantization
from finetune_kernels.primitives import nf4
from finetune_kernels.primitives.byte_products.fp8 import MIN_CAPABILITY
from finetune_kernels.primitives.precision import AMPERE
from finetune_kernels.streaming.host_layers import HostLayers
from finetune_trainer.chat.new_tokens import new_token_ids
from finetune_trainer.distributed.driver import describe_old_card
from finetune_trainer.distributed.other_ranks import BaseFiles
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.base_model.causal_model import choose_functions, load_causal_model
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.base_model.output_head import HEAD
from finetune_trainer.job.machine import free_memory, has_bfloat16
from finetune_trainer.model.configuration.dropout import describe_dropout, dropout_rates
from finetune_trainer.model.configuration.reading import read_base_config, read_published_config
from finetune_trainer.model.cpu_advice import advise_on_cpu
from finetune_trainer.model.description import check_architecture, first_line, load_tokenizer
from finetune_trainer.model.published_weights import published_below
from finetune_trainer.model.safetensors_header import TensorHeader
from finetune_trainer.stages.expert_loading import adopt_experts, quantization_config
from finetune_trainer.stages.nf4_copy import Nf4Copies
from finetune_trainer.stages.streamed_loading import Placement, Share, TakenLayers, decoder_layers, taking_layers
from finetune_trainer.stages.vocabulary_growth import grow_vocabulary
from finetune_trainer.training.loaded_model import DTYPES, LoadedModel

log = logging.getLogger(__name__)
TURING = (7, 5)  # compute capability; CUDA 13 knows no older GPUs


def load_base(
    base: BaseFiles, config: RunConfig, placement: Placement | None, *, makes_copy: bool = False
) -> LoadedModel:
    """Loads the base model of a run that `base` names, as `load_model` does: from its copy in NF4 if the cache has one.
    `makes_copy`: a copy that is not there is made, by the first process of a run."""
    copies = Nf4Copies.within(base.nf4_cache, base.digest, makes=makes_copy)
    precision = config.training.precision
    return load_model(base.folder, config.model, precision, gpus=config.gpus, placement=placement, copies=copies)


def load_model(
    folder: Path, spec: ModelSpec, precision: Precision, *, gpus: int, placement: Placement | None = None,
    copies: Nf4Copies | None = None,
) -> LoadedModel:  # fmt: skip
    """Loads model and tokenizer from `folder`, on the CPU if `gpus` is 0. `placement`: where layers' weights lie,
    if not whole on the device. `copies`: the model's copies in NF4, in a cache that outlives the run.

    Raises TrainerError (UnsupportedArchitecture, UnsafeModel, InvalidConfiguration, ...).
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    device = choose_device(gpus)
    resolved = resolve_precision(precision, device)
    architecture = check_architecture(folder)
    published = published_below(folder)  # names a file that is missing or broke off, which transformers does not
    tokenizer = load_tokenizer(folder, spec)

    compute = DTYPES[resolved]
    for note in (published.sentence(), describe_dropout(dropout_rates(read_published_config(folder)))):
        if note is not None:
            log.info("%s", note)
    if device.type == "cpu":
        _report_cpu(published.own, spec.quantization, compute)

    try:
        weights = _Weights(folder, device, compute, _quantization_config(folder, spec, compute), published.is_plain)
        model, missing, taken = weights.load(placement, copies)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):  # a RuntimeError, with a reason of its own
            raise
        message = f"{spec.source} cannot be loaded as {architecture}: {first_line(error)}"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message) from error

    _check_complete(missing, spec)
    choose_functions(model)
    adopt_experts(model, published.own)
    model.config.use_cache = False  # key-value caches are for generation only
    # A config may tie a head that the weight files hold beside the embedding; transformers then leaves it untied.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    model.config.tie_word_embeddings = head is not None and head.weight is embedding.weight
    new_tokens = new_token_ids(tokenizer, spec.new_tokens)
    grow_vocabulary(model, tokenizer, new_tokens)
    _keep_trainable_layout(model)
    if device.type == "cpu" and taken is None:
        _check_dequantisation(model)
    window = taken.window(model) if taken else None
    streamed = taken.host_layers(model) if taken else HostLayers(decoder_layers(model))
    return LoadedModel(model, tokenizer, architecture, resolved, device, window, new_tokens, streamed)


@dataclass(frozen=True)
class _Weights:
    """A model folder, and how its weights are to be in memory."""

    folder: Path
    device: torch.device
    dtype: torch.dtype
    quantization: Any
    """bitsandbytes' settings; None for weights in 16 bits."""
    is_plain: bool
    """True if transformers loads the folder as it is."""

    def load(
        self, placement: Placement | None, copies: Nf4Copies | None
    ) -> tuple[Any, Collection[str], TakenLayers | None]:
        """Returns the model, the names of parameters that the files lack, and the layers that were taken elsewhere.

        It comes from its copy in NF4 if there is one. If there is none, a process that has the whole model makes it,
        wherever the model lies.
        """
        copy = None if copies is None else copies.copy_of(self.quantization, self.dtype, self.device)
        if copy is not None:
            with taking_layers(placement) if placement else nullcontext() as taken:
                model = copy.load(self.folder, self.device, self.dtype)
            if model is not None:
                return model, (), taken

        with taking_layers(placement) if placement else nullcontext() as taken:
            model, missing = self._load_files()
        if copy is not None and copy.is_made and not isinstance(placement, Share) and not missing:
            copy.save(model, taken.content_of if taken else None)
        return model, missing, taken

    def _load_files(self) -> tuple[Any, Collection[str]]:
        """The model from its own files, and the names of parameters that they lack."""
        if not self.is_plain:
            return load_causal_model(open_base_model(self.folder), self.device, self.dtype, self.quantization)

        found: Any = AutoModelForCausalLM.from_pretrained(
            self.folder,
            config=read_base_config(self.folder),
            dtype=self.dtype,
            quantization_config=self.quantization,
            device_map={"": self.device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        model, info = found
        return model, info["missing_keys"]


def _check_complete(missing: Collection[str], spec: ModelSpec) -> None:
    """Raises TrainerError (InvalidConfiguration) for parameters without weights: transformers makes random ones up."""
    if not missing:
        return

    names = sorted(missing)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    message = f"the weight files of {spec.source} lack {', '.join(names[:3])}{more}: get the files again"
    if HEAD in missing:
        message += ", or write tie_word_embeddings: true into config.json if the model shares its embedding"
    raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)


def _quantization_config(folder: Path, spec: ModelSpec, compute: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings; None for weights in 16 bits."""
    if spec.quantization is not Quantization.NF4:
        return None

    return quantization_config(
        folder, bnb_4bit_use_double_quant=spec.double_quantization, bnb_4bit_compute_dtype=compute
    )


def _report_cpu(headers: Sequence[TensorHeader], quantization: Quantization, compute: torch.dtype) -> None:
    """Logs the compute type, and what would make the run faster."""
    log.info("computing on the CPU in %s", str(compute).removeprefix("torch."))
    if advice := advise_on_cpu(headers, quantization, each=compute.itemsize, free=free_memory()):
        log.info("this run could be faster: %s", advice)


def _keep_trainable_layout(model: Any) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for inference.

    On CPUs with AVX512-BF16 it does so in place, in the first evaluation, and its kernel for that layout has no
    backward: every later step would train with wrong gradients (docs/lab-notes.md).
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _check_dequantisation(model: Any) -> None:
    """Raises TrainerError (InvalidConfiguration) if this CPU dequantises a weight wrongly.

    On CPUs with AVX512, bitsandbytes 0.50 takes wrong scales where a row ends within a block (docs/lab-notes.md).
    """
    for name, module in model.named_modules():
        weight: Any = module.weight if isinstance(module, Linear4bit) else None
        if weight is None or weight.quant_state.shape[-1] % weight.quant_state.blocksize == 0:
            continue

        packed, state = weight.data, weight.quant_state
        if not torch.allclose(dequantize_4bit(packed, state).float(), nf4.reference(packed, state).float(), rtol=0.01):
            message = (
                f"spec.model.quantization: on this CPU bitsandbytes dequantises {name} wrongly: its rows have "
                f"{state.shape[-1]} weights, not a multiple of {state.blocksize}; write None, or train on a GPU"
            )
            raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Returns the compute type on this device, which is what Auto and FP8 stand for, or `precision` itself.

    Raises TrainerError (InvalidConfiguration) if the device lacks the type, or is too old for any.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if device.type == "cuda" and capability < TURING:
        message = f"spec.resources: {describe_old_card(torch.cuda.get_device_name(device))}"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
    if precision is Precision.AUTO:
        if device.type == "cpu":
            return Precision.BF16 if has_bfloat16() else Precision.FP32
        return Precision.BF16 if capability >= AMPERE else Precision.FP16

    if precision in (Precision.FP16, Precision.FP8) and device.type == "cpu":
        message = f"spec.training.precision: {precision} trains on GPUs only; write FP32 or BF16 for a CPU run"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)

    if precision is Precision.FP8:
        if capability < MIN_CAPABILITY:
            message = "spec.training.precision: this GPU has no FP8; write BF16 or FP16"
            raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
        return Precision.BF16  # until the first batch has decided (fp8_gate.py)

    if precision is Precision.BF16 and device.type == "cuda" and capability < AMPERE:
        message = "spec.training.precision: this GPU has no BF16; write FP16 or FP32"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
    return precision


def choose_device(gpus: int) -> torch.device:
    """The process's GPU, or the CPU if `gpus` is 0. Raises TrainerError if there is no GPU."""
    if gpus == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        message = f"spec.resources.gpus is {gpus}, but no CUDA device is visible: check the driver, or write gpus: 0"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
    return torch.device("cuda", 0)
