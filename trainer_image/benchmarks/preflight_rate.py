"""Measures rate and memory of preflight: large files of ordinary rows, and files with one enormous row. Not in CI.

    python trainer_image/benchmarks/preflight_rate.py --gigabytes 1

Each file is given to `finetune validate` in a process of its own, whose CPU time and peak memory the kernel counts. The
tokenizer is trained on the rows' words and filled up to as many tokens as a large model's has, as its memory depends on
that.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TOKENS = 128_000
MEGABYTE = 1e6
LONG_ROW_BYTES = 50_000_000
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": TOKENS,
}


@dataclass(frozen=True)
class Measured:
    """The kernel's counts for one process."""

    file_bytes: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def main() -> None:
    """Measures every file and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where the files lie (default: TMPDIR)")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="preflight-rate-", dir=arguments.folder) as name:
        folder = Path(name)
        model = make_model(folder / "model")
        size = int(arguments.gigabytes * 1e9)
        rows = {
            f"{arguments.gigabytes:g} GB of chat": write_rows(folder / "rows.jsonl", size),
            "the same, every tenth row bad": write_rows(folder / "bad.jsonl", size, bad_every=10),
            "one row of 50 MB": write_rows(folder / "long.jsonl", LONG_ROW_BYTES + size // 10, long_row="word "),
            "the same, with an emoji": write_rows(
                folder / "wide.jsonl", LONG_ROW_BYTES + size // 10, long_row="word ", ends_with="\N{GRINNING FACE}"
            ),
        }

        show({name: measure(path, model, folder) for name, path in rows.items()})


def make_model(folder: Path) -> Path:
    """Makes a model folder without weights: preflight looks at their names only."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(b"")

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator((f" {word}" for word in words_of(random.Random(1))), trainer)  # noqa: S311

    # Tokens beyond those of the rows' words, up to the number that a large model has.
    trained = json.loads(bpe.to_str())["model"]
    bpe.model = models.BPE(*fill(trained["vocab"], [tuple(pair) for pair in trained["merges"]], alphabet))
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    bpe.save(str(folder / "tokenizer.json"))

    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def fill(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], alphabet: list[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Adds tokens that occur nowhere, up to `TOKENS`."""
    chance = random.Random(0)  # noqa: S311
    tokens = list(vocabulary)
    while len(vocabulary) < TOKENS - 2:
        left, right = chance.choice(tokens), chance.choice(alphabet)
        if left + right not in vocabulary:
            merges.append((left, right))
            vocabulary[left + right] = len(vocabulary)
    return vocabulary, merges


def write_rows(path: Path, size: int, *, bad_every: int = 0, long_row: str = "", ends_with: str = "") -> Path:
    """Writes conversations of 0.2 to 4 kB, about 2 kB on average; the hundredth may be a long one."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for number, messages in enumerate(conversations()):
            if bad_every and number % bad_every == 0:
                messages[1]["role"] = "robot"
            if long_row and number == 100:
                messages[0]["content"] = long_row * (LONG_ROW_BYTES // len(long_row)) + ends_with

            line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
            written += len(line)
            file.write(line)
            if written >= size:
                return path
    raise AssertionError("conversations never end")


def conversations() -> Iterator[list[dict[str, str]]]:
    """Conversations without end, of random words with some letters beyond ASCII."""
    chance = random.Random(1)  # noqa: S311
    words = words_of(chance)
    while True:
        turns = chance.choice((2, 4))
        yield [
            {
                "role": ("user", "assistant")[turn % 2],
                "content": " ".join(chance.choices(words, k=chance.randint(10, 200))),
            }
            for turn in range(turns)
        ]


def words_of(chance: random.Random) -> list[str]:
    """The words that occur."""
    letters = "abcdefghijklmnopqrstuvwxyzäöüéñ"
    return ["".join(chance.choices(letters, k=chance.randint(1, 10))) for _ in range(20_000)]


def measure(data: Path, model: Path, folder: Path) -> Measured:
    """Runs `finetune validate` on one file."""
    manifest = folder / "job.yaml"
    spec = {
        "model": {"source": f"file://{model}"},
        "dataset": {"source": f"file://{data}", "onBadRow": "Skip"},
        "output": {"s3": {"bucket": "unused"}},
    }
    job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "rate"}, "spec": spec}
    manifest.write_text(json.dumps(job))

    command = [
        str(Path(sys.executable).with_name("finetune")),
        "validate",
        str(manifest),
        "--output",
        str(folder / "out"),
    ]

    began = time.monotonic()
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(command, stdout=said, env=os.environ | {"PYTHONSAFEPATH": "1"})
        peak = 0
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            peak = max(peak, read_peak(process.pid))
            time.sleep(0.05)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began

    if status:
        sys.exit(f"finetune validate failed:\n{(folder / 'said').read_text()}")
    cpu = usage.ru_utime + usage.ru_stime
    return Measured(data.stat().st_size, seconds, cpu, peak)


def read_peak(process: int) -> int:
    """Most bytes that were resident at once; 0 for a process that has ended.

    The peak of wait4 is no use: it counts the parent's memory before exec as well.
    """
    status = Path(f"/proc/{process}/status").read_text()
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def show(measured: dict[str, Measured]) -> None:
    """Prints one line for each file."""
    table = Table("file", "MB", "seconds", "MB/s", "MB per CPU second", "peak MiB")
    for name, found in measured.items():
        size = found.file_bytes / MEGABYTE
        rate, per_core = size / found.seconds, size / found.cpu_seconds
        peak = found.peak_bytes / 2**20
        table.add_row(name, f"{size:,.0f}", f"{found.seconds:.1f}", f"{rate:.1f}", f"{per_core:.1f}", f"{peak:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
