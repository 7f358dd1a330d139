"""Architectures by their `model_type`: those that are language models, and those whose documents see each other.

Pure, and without PyTorch: preflight asks before a GPU is taken. transformers' own tables tell encoders and parts of
encoder-decoder models from decoders, so a new version brings its new ones along; the few that it lists nowhere else
are written here.
"""

from transformers import __version__ as transformers_version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
)

from finetune_trainer.model.family_table import model_families, unpacked_types

FIRST_STEP = "the first step of a small model fails"
ENCODER = "an encoder: each token sees the tokens after it, which it is to predict"
PART = "a part of an encoder-decoder model, which needs the other part's output"
_PARTS = (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
)
_OTHERS = {
    "bert-generation": PART,
    "trocr": PART,
    "moshi": "a model of speech, whose text is one of its streams",
    "git": "a model of captions, which begins with an image",
    "cpmant": "a model that reads its prompt in both directions",
    "xlnet": "a model that predicts tokens in any order",
    "blt": "a model of bytes, which needs a second model to cut them into patches",
    "gemma4_assistant": "a draft model, which needs the states of the model that it drafts for",
    "gemma4_unified_assistant": "a draft model, which needs the states of the model that it drafts for",
}

UNPACKED = unpacked_types()
"""Types whose packed documents see each other, or that do not take them. Training asks the loaded model; this only lets
preflight say it before."""


def why_untrainable(model_type: str) -> str | None:
    """Returns the reason why no model of this type can be trained here, for people; None if it can."""
    if reason := why_no_decoder(model_type):
        return reason
    family = model_families().get(model_type)
    if family is None or family.refused is None or family.batching is not None or FIRST_STEP not in family.refused:
        return None
    return (
        f"model type {model_type} cannot be trained with transformers {transformers_version}: {family.refused}; take a "
        "model of another type, which docs/families.md lists"
    )


def why_no_decoder(model_type: str) -> str | None:
    """Returns the reason why a model of this type is no decoder that transformers knows; None if it is one."""
    if model_type not in CONFIG_MAPPING:
        return (
            f"transformers {transformers_version} does not know the model type {model_type}: take a model of a type "
            "that it knows, or a trainer image with a newer transformers"
        )

    if model_type in _OTHERS:
        nature = _OTHERS[model_type]
    elif any(model_type in table for table in _PARTS):
        nature = PART
    elif model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        nature = ENCODER
    elif model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        nature = "no causal language model of transformers"
    else:
        return None
    return f"model type {model_type} is {nature}; take a decoder, such as Llama, Qwen or Gemma"
