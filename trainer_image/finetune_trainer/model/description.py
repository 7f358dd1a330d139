"""Describes a model by its folder alone, without its weights: architecture, configuration, tokenizer.

Needs no PyTorch, so that preflight can ask on a CPU.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_api.failures import FailureReason
from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import TrainOn
from finetune_trainer.chat.embedding import unknown_token_error
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.chat.templates import use_named_template
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.architectures import why_untrainable

LANGUAGE_MODELS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
"""Architecture of a multimodal checkpoint -> that of the language model in it, which `finetune export` takes out."""

TOKENIZER_FILES = "tokenizer.json, tokenizer.model"


def check_architecture(folder: Path) -> str:
    """The architecture that config.json names. Raises TrainerError unless transformers itself has it, it is a language
    model, and its weights are 16-bit or bitsandbytes'."""
    config, architecture = _read_architecture(folder)
    model_type = config.get("model_type")

    # transformers itself must have the architecture: code from a repository is never run.
    if architecture not in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        if "auto_map" in config:
            message = f"{architecture} needs Python code from the model's repository, which is never run"
            raise TrainerError(FailureReason.UNSAFE_MODEL, message)
        if isinstance(model_type, str) and (reason := why_untrainable(model_type)):
            raise TrainerError(FailureReason.UNSUPPORTED_ARCHITECTURE, reason)
        message = f"architecture {architecture} is not a causal language model of transformers"
        raise TrainerError(FailureReason.UNSUPPORTED_ARCHITECTURE, message)

    if architecture.endswith("ForConditionalGeneration"):
        message = f"{architecture} reads more than text, but only language models are trained"
        if architecture in LANGUAGE_MODELS:
            message += (
                ": take its language model out with `finetune export --base SRC --output DIR --merged BF16`, and set "
                "spec.model.source to DIR/merged, or to where you put that folder"
            )
        raise TrainerError(FailureReason.UNSUPPORTED_ARCHITECTURE, message)

    if isinstance(model_type, str) and (reason := why_untrainable(model_type)):
        raise TrainerError(FailureReason.UNSUPPORTED_ARCHITECTURE, reason)

    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "bitsandbytes"):
        message = f"the model's weights are {method}-quantised: set spec.model.source to the original 16-bit model"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)

    load_configuration(folder)
    return architecture


def _read_architecture(folder: Path) -> tuple[dict[str, Any], str]:
    """config.json, and the first architecture that it names."""
    path = folder / "config.json"
    if not path.is_file():
        message = "the model has no config.json, so it is not a Hugging Face model folder"
        raise TrainerError(FailureReason.MODEL_NOT_FOUND, message)

    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config, str((config.get("architectures") or ["none"])[0])
    except (ValueError, AttributeError):
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, "the model's config.json is not valid JSON") from None


def load_tokenizer(folder: Path, spec: ModelSpec) -> Any:
    """The tokenizer below `folder` with the job's chat template. Raises TrainerError (ModelNotFound,
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

    own = tokenizer.chat_template
    if not all(isinstance(template, str) for template in (own.values() if isinstance(own, dict) else [own or ""])):
        message = (
            f"{spec.source} has a chat template that is not text: set spec.model.chatTemplateName or "
            "spec.model.chatTemplate"
        )
        raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, message)

    _check_embedding(folder, tokenizer)
    _set_template(tokenizer, spec)
    return tokenizer


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
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True).get_text_config()
    except Exception as error:  # the file may hold anything, and each model type checks its own fields
        message = f"the model's config.json cannot be used: {first_line(error)}"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message) from error


def first_line(error: Exception) -> str:
    """The error's first line, at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
