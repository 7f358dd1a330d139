"""Options of `finetune chat`; nothing heavy is imported for them."""

import argparse
from pathlib import Path


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `finetune chat`."""
    parser.add_argument(
        "result",
        help="a job's output folder, a folder of merged weights or with an adapter, or a .gguf file",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end (default: ask in the terminal, or stdin)")
    parser.add_argument("--system", metavar="TEXT", help="system message at the beginning of the conversation")

    parser.add_argument("--compare", action="store_true", help="show the base's answer beside the fine-tuned model's")
    parser.add_argument("--max-tokens", type=_positive, default=512, metavar="N", help="at most (default: 512)")
    parser.add_argument(
        "--temperature", type=_not_negative, default=0.0, metavar="T", help="0: always the likeliest token (default)"
    )
    parser.add_argument("--base", metavar="SRC", help="base model, if the result does not say: folder or hf://org/name")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--credentials", type=Path, metavar="DIR", help="folder with HF_TOKEN or AWS keys as files")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}: write a whole number from 1 on")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}: write a number from 0 on, such as 0.7")
    return value
