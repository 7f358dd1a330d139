"""Models to talk to, from the forms in which a job publishes them."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finetune_api.base import Json
from finetune_api.failures import FailureReason
from finetune_trainer.cli.chat.find_model import BaseSource, FoundModel, Kind
from finetune_trainer.cli.chat.speaker import Speaker
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.base_model.adapter_names import copy_with_trained_names
from finetune_trainer.export.base_model.causal_model import choose_functions, load_causal_model
from finetune_trainer.export.base_model.folder import new_tokens_of_adapter, open_base_model
from finetune_trainer.export.gguf.families.table import GGUF_FAMILIES
from finetune_trainer.export.gguf.stored_weights import list_gguf_weights
from finetune_trainer.export.judge.measure import choose_dtype
from finetune_trainer.export.judge.streamed_model import build_without_weights
from finetune_trainer.export.tensor_io.tensor_reader import read_tensors
from finetune_trainer.model.configuration.reading import read_published_config
from finetune_trainer.model.description import first_line, read_written_config
from finetune_trainer.model.multimodal import is_multimodal
from finetune_trainer.model.published_weights import published_below
from finetune_trainer.sources import SourceAccess, fetch_model, fetch_model_configuration
from finetune_trainer.stages.vocabulary_growth import grow_vocabulary
from finetune_trainer.storage.object_store import ignore_bytes
from finetune_trainer.training.samples import end_tokens

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BASE, TUNED = "base", "fine-tuned"
NEEDS_BASE = "name the base model with --base: a folder, or hf://org/name"


@dataclass(frozen=True)
class Workshop:
    """The device that models are loaded on, and a folder for what has to be downloaded."""

    device: torch.device
    work: Path
    access: SourceAccess


def load_speakers(found: FoundModel, shop: Workshop, *, compare: bool) -> list[Speaker]:
    """Loads the fine-tuned model, and before it the base if both are to be compared. Raises TrainerError."""
    if found.kind is Kind.ADAPTER:
        return _load_adapted(found, shop, compare=compare)

    before = [_load_folder(_fetch_base(found.base, shop), shop, BASE)] if compare else []
    if found.kind is Kind.GGUF:
        return [*before, _load_gguf(found, shop)]
    return [*before, _load_folder(found.path, shop, TUNED)]


def _load_adapted(found: FoundModel, shop: Workshop, *, compare: bool) -> list[Speaker]:
    """The base with its adapter; the base alone is the same model with the adapter switched off."""
    folder = _fetch_base(found.base, shop)
    base = _load_folder(folder, shop, BASE)
    tokenizer = base.tokenizer
    if (found.path / "tokenizer.json").is_file():
        tokenizer = _load_tokenizer(found.path)  # with the template and the new tokens that were trained with
    with _explained(found.path):
        grow_vocabulary(base.model, tokenizer, tuple(new_tokens_of_adapter(found.path, folder)))
        is_whole = is_multimodal(read_written_config(folder))
        adapter = copy_with_trained_names(found.path, shop.work / "adapter") if is_whole else found.path
        model = PeftModel.from_pretrained(base.model, str(adapter)).eval()

    tuned = Speaker(TUNED, model, tokenizer, end_tokens(base.model, tokenizer))
    # Both answer the same tokens: the base gets the template of the training as well.
    return [replace(tuned, name=BASE, scope=model.disable_adapter), tuned] if compare else [tuned]


def _load_folder(folder: Path, shop: Workshop, name: str) -> Speaker:
    tokenizer = _load_tokenizer(folder)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    dtype = _dtype(shop.device, weights // 2)
    with _explained(folder):
        model = _load_weights(folder, shop.device, dtype)
    choose_functions(model)
    return Speaker(name, model.eval(), tokenizer, end_tokens(model, tokenizer))


def _load_weights(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The language model in a folder."""
    if not published_below(folder).is_plain:
        return load_causal_model(open_base_model(folder), device, dtype)[0]

    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )


def _load_gguf(found: FoundModel, shop: Workshop) -> Speaker:
    """The weights of a GGUF file, decoded into transformers' model.

    Its configuration is the base's where that is known: llama.cpp's metadata say less.
    """
    folder = None
    if found.base is not None:
        fetched = fetch_model_configuration(
            found.base.uri, found.base.revision, shop.work / "configuration", shop.access
        )
        folder = fetched.folder
        with _explained(folder):
            config: Json = read_published_config(folder).to_dict()
    else:
        config = _config_of_gguf(found.path)

    # The file decides whether the head is the embedding: a configuration may say so although there is a head.
    config["tie_word_embeddings"] = all(tensor.name != "output.weight" for tensor in GGUFReader(found.path).tensors)
    model = build_without_weights(config, shop.device, _dtype(shop.device, found.path.stat().st_size))
    _fill(model, found.path, config, shop.device)
    if folder is not None and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)

    tokenizer = _load_tokenizer(found.tokenizer) if found.tokenizer else _tokenizer_of_gguf(found.path)
    return Speaker(f"{TUNED} ({found.path.name})", model, tokenizer, end_tokens(model, tokenizer))


def _fill(model: Any, path: Path, config: Json, device: torch.device) -> None:
    """Decodes every weight of the file into the model."""
    is_tied = config["tie_word_embeddings"]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if not (is_tied and name == HEAD)]
    shapes = [(name, tuple(model.get_parameter(name).shape)) for name in names]
    stored = list_gguf_weights(path, config, shapes, model.dtype)

    with closing(read_tensors(stored, device)) as tensors:
        for tensor, values in tensors:
            module, _, leaf = tensor.name.rpartition(".")
            weights = nn.Parameter(values.to(model.dtype, copy=True), requires_grad=False)
            model.get_submodule(module).register_parameter(leaf, weights)
    if is_tied:
        model.lm_head.weight = model.get_parameter(EMBEDDING)


def _config_of_gguf(path: Path) -> Json:
    """The configuration as the file's metadata have it. Raises TrainerError where they do not say enough."""
    reader = GGUFReader(path)
    # Phi 3's files name the original context whether it is scaled or not.
    scaled = [name for name in reader.fields if ".rope.scaling." in name and not name.endswith("context_length")]
    scaled += [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    if scaled:
        message = f"{path} scales RoPE, which only the base's config.json describes in full: {NEEDS_BASE}"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)

    with _explained(path):
        config: Json = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    family = GGUF_FAMILIES.get(str(config["model_type"]))
    if family is not None and family.fixed_scale_layers is not None:
        # llama.cpp hard-codes the scale of attention, so the file does not have it.
        per_head = config["hidden_size"] // config["num_attention_heads"]
        is_fixed = config["num_hidden_layers"] == family.fixed_scale_layers
        config["query_pre_attn_scalar"] = per_head if is_fixed else config["head_dim"]
    return config


def _fetch_base(base: BaseSource | None, shop: Workshop) -> Path:
    if base is None:
        message = f"nothing here says which base model this was made from: {NEEDS_BASE}"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
    return fetch_model(base.uri, base.revision, shop.work / "base", shop.access, ignore_bytes).folder


def _load_tokenizer(folder: Path) -> Any:
    with _explained(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _tokenizer_of_gguf(path: Path) -> Any:
    with _explained(path):
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _dtype(device: torch.device, weights: int) -> torch.dtype:
    """fp32 on a CPU, which is faster there, as long as a model of this many weights fits half the free memory."""
    if device.type == "cpu" and 4 * weights > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
        return torch.bfloat16
    return choose_dtype(device)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns the errors of transformers and peft about files at `path` into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        message = f"{path} cannot be loaded: {first_line(error)}"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message) from error
