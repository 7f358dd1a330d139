"""The tokens of `spec.model.newTokens`, added to a tokenizer: their ids, and the rows that the model then needs. Pure.

They are ordinary words of the vocabulary: matched as they are written, wherever they stand, and never hidden from an
answer's text. A named chat template may make one of them its end of turn.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken

from finetune_api.failures import FailureReason
from finetune_trainer.data.strict_json import excerpt
from finetune_trainer.errors import TrainerError

FIELD = "spec.model.newTokens"
EMBEDDING, HEAD, HEAD_BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"
ROW_MULTIPLE = 64
"""Products with a head of 128,259 rows are slow on a GPU: 16-bit rows of logits begin at odd addresses then."""
TO_GO_ON = "leave the field out, and the texts train as the pieces that they are now"


def add_new_tokens(tokenizer: Any, texts: Sequence[str]) -> None:
    """Adds the tokens to transformers' `tokenizer`, with ids behind all that it has, in the order of `texts`.

    Raises TrainerError (InvalidConfiguration) for a text that is a token already, and for a tokenizer that cannot be
    added to.
    """
    if not texts:
        return
    if not getattr(tokenizer, "is_fast", False):
        raise _refuse(f"{type(tokenizer).__name__} has no tokenizer.json to add tokens to: {TO_GO_ON}")

    known = {text: number for text in texts if (number := _present_id(tokenizer, text)) is not None}
    if known:
        named = ", ".join(f"{excerpt(text)} (id {number})" for text, number in list(known.items())[:3])
        raise _refuse(f"the model's tokenizer already has {named} as one token: remove it from the list")

    taken = set(tokenizer.get_vocab().values())
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    ids = new_token_ids(tokenizer, texts)
    # A vocabulary with gaps makes the tokenizers package give an id twice.
    if taken & set(ids) or list(ids) != list(range(ids[0], ids[0] + len(ids))) or ids[0] <= max(taken):
        raise _refuse(f"the ids of the model's tokenizer have gaps, so that new ones would overlap: {TO_GO_ON}")


def new_token_ids(tokenizer: Any, texts: Sequence[str]) -> tuple[int, ...]:
    """Returns the ids of tokens that were added, in the order of `texts`."""
    return tuple(int(number) for number in tokenizer.convert_tokens_to_ids(list(texts)))


def grown_rows(rows: int, ids: Collection[int]) -> int:
    """Returns the rows of an embedding of `rows` with the tokens `ids`: as many as before if it has rows to spare."""
    needed = max(ids, default=-1) + 1
    return rows if needed <= rows else -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE


def check_growable(config: Mapping[str, Any], names: Collection[str] | None) -> None:
    """Raises TrainerError (UnsupportedArchitecture) for a model whose vocabulary is more than embedding and head.

    `config` is the language model's; `names` are those of its weights, None if they are not known.
    """
    if config.get("hidden_size_per_layer_input"):
        problem = "the model has rows for every token in each of its layers as well"
    elif names is not None and EMBEDDING not in names:
        problem = f"the model keeps its embedding under another name than {EMBEDDING}"
    elif names is not None and HEAD_BIAS in names:
        problem = "the model's head has a bias for every token"
    else:
        return
    raise TrainerError(
        FailureReason.UNSUPPORTED_ARCHITECTURE, f"{FIELD}: {problem}, so new tokens cannot be added: {TO_GO_ON}"
    )


def _present_id(tokenizer: Any, text: str) -> int | None:
    """The id of a text that is one token already, by its name or as it is encoded."""
    named = tokenizer.get_vocab().get(text)
    if named is not None:
        return int(named)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def _refuse(problem: str) -> TrainerError:
    return TrainerError(FailureReason.INVALID_CONFIGURATION, f"{FIELD}: {problem}")
