"""The process in which llama.cpp's converter runs, with its own `gguf` package first on the path.

One JSON request on standard input, one JSON list on standard output (see `llama_cpp_converter`).
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DRAFTING = ("qwen3_next", "qwen3_5")
"""Model types whose layers that only draft tokens the converter must be told to leave out, as transformers does."""


def main() -> None:
    """Answer the request."""
    request = json.load(sys.stdin)
    answer_to = os.dup(1)
    os.dup2(2, 1)  # the converter and SentencePiece print
    (kind, body), *_ = request.items()
    answers: dict[str, Callable[[Any], list[Any]]] = {"convert": _convert, "recognise": _recognise, "train": _train}
    answer = answers[kind](body)
    with os.fdopen(answer_to, "w") as out:
        json.dump(answer, out)


def _convert(conversions: list[dict[str, str]]) -> list[str]:
    import convert_hf_to_gguf
    from conversion.base import TextModel
    from conversion.hunyuan import HunYuanMoEModel

    # It reads Hunyuan A13B's vocabulary from code of the first repository, which had no tokenizer.json.
    HunYuanMoEModel.set_vocab = TextModel._set_vocab_gpt2
    recognise = TextModel.get_vocab_base_pre
    for each in conversions:

        def recognise_or_use(model: Any, tokenizer: Any, name: str = each["pre_tokenizer"]) -> str:
            try:
                return str(recognise(model, tokenizer))
            except NotImplementedError:
                return name

        TextModel.get_vocab_base_pre = recognise_or_use
        options = ["--outtype", each["type"], "--outfile", each["output"], "--model-name", each["name"]]
        config = json.loads((Path(each["model"]) / "config.json").read_text())
        if config["model_type"].startswith(DRAFTING):
            options.append("--no-mtp")
        sys.argv = ["convert_hf_to_gguf.py", each["model"], *options]
        convert_hf_to_gguf.main()
    return [each["output"] for each in conversions]


def _recognise(folders: list[str]) -> list[str | None]:
    from conversion.base import TextModel
    from transformers import PreTrainedTokenizerFast

    model = object.__new__(TextModel)
    names: list[str | None] = []
    for folder in folders:
        try:
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")  # type: ignore[no-untyped-call]
            names.append(TextModel.get_vocab_base_pre(model, tokenizer))
        except NotImplementedError:
            names.append(None)
    return names


def _train(request: dict[str, Any]) -> list[tuple[str, float]]:
    import sentencepiece

    path = Path(request["folder"]) / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(request["texts"]),
            model_writer=file,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
            **request["options"],
        )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [(pieces.IdToPiece(index), pieces.GetScore(index)) for index in range(pieces.GetPieceSize())]


if __name__ == "__main__":
    main()
