"""Describes a model by its folder alone, without its weights: architecture, configuration, tokenizer.

Needs no PyTorch, so that preflight can ask on a CPU.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_api.failures import FailureReason
from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import TrainOn
from finetune_trainer.chat.embedding import unknown_token_error
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.chat.new_tokens import add_new_tokens
from finetune_trainer.chat.templates import use_named_template
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.architectures import why_untrainable
from finetune_trainer.model.configuration.reading import read_language_model_config
from finetune_trainer.model.multimodal import LANGUAGE_MODEL_AT, is_multimodal
from finetune_trainer.model.published_formats import METHODS

NOT_JSON = "the model's config.json is not valid JSON"
TOKENIZER_FILES = "tokenizer.json, tokenizer.model"


def check_architecture(folder: Path) -> str:
    """The architecture that config.json names. Raises TrainerError unless transformers itself has it, it is a language
    model or has one that trains by itself, and its weights are in a format that can be loaded."""
    config, architecture = read_written_config(folder), read_architecture(folder)
    if not is_multimodal(config):
        _check_language_model(config, architecture)

    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in METHODS:
        message = (
            f"the model's weights are {method}-quantised, and only 16-bit, bitsandbytes, FP8 and MXFP4 weights are "
            "read: set spec.model.source to the original 16-bit model"
        )
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)

    load_configuration(folder)
    return architecture


def _check_language_model(config: dict[str, Any], architecture: str) -> None:
    """Raises TrainerError for a class that is no language model of transformers."""
    model_type = config.get("model_type")
    why_not = why_untrainable(model_type) if isinstance(model_type, str) else None

    # transformers itself must have the architecture: code from a repository is never run.
    if architecture not in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        if "auto_map" in config:
            message = f"{architecture} needs Python code from the model's repository, which is never run"
            raise TrainerError(FailureReason.UNSAFE_MODEL, message)
        if "text_config" in config and model_type in CONFIG_MAPPING:
            raise TrainerError(FailureReason.UNSUPPORTED_ARCHITECTURE, _explain_unknown(architecture))
        message = why_not or f"architecture {architecture} is not a causal language model of transformers"
        raise TrainerError(FailureReason.UNSUPPORTED_ARCHITECTURE, message)

    if architecture.endswith("ForConditionalGeneration"):
        raise TrainerError(FailureReason.UNSUPPORTED_ARCHITECTURE, _explain_unknown(architecture))
    if why_not is not None:
        raise TrainerError(FailureReason.UNSUPPORTED_ARCHITECTURE, why_not)


def _explain_unknown(architecture: str) -> str:
    return (
        f"{architecture} reads more than text, and it is not known how its language model trains by itself: take a "
        f"language model, or one of the types {', '.join(LANGUAGE_MODEL_AT)}"
    )


def read_architecture(folder: Path) -> str:
    """The first architecture that config.json names. Raises TrainerError like `read_written_config`."""
    try:
        return str((read_written_config(folder).get("architectures") or ["none"])[0])
    except (TypeError, KeyError):
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, NOT_JSON) from None


def read_written_config(folder: Path) -> dict[str, Any]:
    """config.json as written. Raises TrainerError (ModelNotFound, InvalidConfiguration)."""
    path = folder / "config.json"
    if not path.is_file():
        message = "the model has no config.json, so it is not a Hugging Face model folder"
        raise TrainerError(FailureReason.MODEL_NOT_FOUND, message)

    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, NOT_JSON)
    return config


def load_tokenizer(folder: Path, spec: ModelSpec) -> Any:
    """The tokenizer below `folder` with the job's new tokens and chat template. Raises TrainerError (ModelNotFound,
    InvalidConfiguration, InvalidChatTemplate)."""
    if not any(_holds_tokenizer(path.name) for path in folder.iterdir()):
        # transformers would make an empty tokenizer of the model's type, to which every word is unknown.
        message = f"{spec.source} has no tokenizer ({TOKENIZER_FILES}): put the base model's own tokenizer beside it"
        raise TrainerError(FailureReason.MODEL_NOT_FOUND, message)

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, use_fast=True)
    except Exception as error:  # tokenizers raises Exception itself, and files may hold anything
        message = f"{spec.source} has no usable tokenizer: {first_line(error)}"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message) from error

    if tokenizer.chat_template is None:
        tokenizer.chat_template = _template_of_processor(folder)
    own = tokenizer.chat_template
    if not all(isinstance(template, str) for template in (own.values() if isinstance(own, dict) else [own or ""])):
        message = (
            f"{spec.source} has a chat template that is not text: set spec.model.chatTemplateName or "
            "spec.model.chatTemplate"
        )
        raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, message)

    _check_embedding(folder, tokenizer)
    add_new_tokens(tokenizer, spec.new_tokens)
    _set_template(tokenizer, spec)
    return tokenizer


def _template_of_processor(folder: Path) -> object:
    """The chat template of a checkpoint that has it beside its processor for images; None if there is none."""
    try:
        return json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _holds_tokenizer(name: str) -> bool:
    """True for the name of a file with a vocabulary."""
    return name in ("tokenizer.json", "tekken.json") or name.endswith(".model") or name.startswith("vocab.")


def _set_template(tokenizer: Any, spec: ModelSpec) -> None:
    """Gives the tokenizer the chat template that the job names or contains, if any."""
    if spec.chat_template_name is not None:
        use_named_template(tokenizer, spec.chat_template_name)

    if spec.chat_template is not None:
        tokenizer.chat_template = spec.chat_template
        try:
            ChatEncoder(tokenizer, TrainOn.RESPONSES).render_probe()
        except (BadRowError, TrainerError) as error:
            raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, f"spec.model.chatTemplate: {error}") from None


def _check_embedding(folder: Path, tokenizer: Any) -> None:
    """Refuses a tokenizer with words that the model has no embedding for.

    Special tokens that nothing writes (a [PAD] that someone added) do no harm; rows that contain one are refused when
    they are encoded.
    """
    try:
        rows = embedding_rows(load_configuration(folder)) if (folder / "config.json").is_file() else None
    except TrainerError:  # check_architecture reports it
        return
    if rows is None:
        return

    added = tokenizer.added_tokens_decoder
    needed = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    words = {
        number: token
        for number, token in beyond.items()
        if number in needed or number not in added or not added[number].special
    }
    if words:
        raise unknown_token_error(words, rows)


def embedding_rows(configuration: Any | None) -> int | None:
    """Number of token ids that a model of this configuration knows; None if it does not say."""
    rows = getattr(configuration, "vocab_size", None)
    return rows if isinstance(rows, int) else None


def load_configuration(folder: Path) -> Any:
    """transformers' configuration of the language model below `folder`. Raises TrainerError (InvalidConfiguration)."""
    try:
        return read_language_model_config(folder)
    except Exception as error:  # the file may hold anything, and each model type checks its own fields
        message = f"the model's config.json cannot be used: {first_line(error)}"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message) from error


def first_line(error: Exception) -> str:
    """The error's first line, at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
