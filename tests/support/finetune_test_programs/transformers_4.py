"""transformers 4.57, a judge of published folders: what vLLM and TGI read them with.

It lies in an environment of its own without PyTorch (150 MB, made once), and runs in a process of its own; models take
PyTorch from this one's environment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from finetune_test_programs.binaries import locked

PACKAGES = ("transformers==4.57.6", "jinja2==3.1.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2")
CACHE = Path(os.environ.get("CACHE") or Path.home() / ".cache/finetune-operator") / "transformers-4"
PROGRAM = """
import json, sys
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
found = {}
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    found[folder] = {
        "class": type(tokenizer).__name__,
        "ids": tokenizer("seven birds in a garden")["input_ids"],
        "chat": tokenizer.apply_chat_template(chat, tokenize=False) if tokenizer.chat_template else None,
        "eos": tokenizer.eos_token_id,
        "ends": GenerationConfig.from_pretrained(folder).eos_token_id,
    }
print(json.dumps(found))
"""
MODEL = """
import json, sys
folder, target, torch_packages, tokens = sys.argv[1:]
sys.path.append(torch_packages)  # behind its own packages
import torch
from transformers import AutoModelForImageTextToText
model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
ids = torch.tensor([json.loads(tokens)])
with torch.no_grad():
    logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
model.save_pretrained(target)
torch.save(logits, target + "/logits.pt")
print(json.dumps({}))
"""


def read_folders(*folders: Path) -> dict[str, Any]:
    """Tokenizer and ends of each folder, as transformers 4.57 reads them; raises RuntimeError with what it says."""
    return _run(PROGRAM, *map(str, folders))


def load_and_save(folder: Path, target: Path, tokens: list[int]) -> torch.Tensor:
    """Logits [1, T, vocabulary] in fp32 of a checkpoint that also reads images, which is then saved below `target` as
    transformers 4.57 saves it; raises RuntimeError with what it says."""
    target.mkdir(parents=True)
    _run(MODEL, str(folder), str(target), str(Path(torch.__file__).parents[1]), json.dumps(tokens))
    logits: torch.Tensor = torch.load(target / "logits.pt")
    return logits


def _run(program: str, *arguments: str) -> dict[str, Any]:
    """What a program says in its last line of JSON."""
    command = [str(_python()), "-c", program, *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"transformers 4.57 refuses the folder:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _python() -> Path:
    """Interpreter of the environment; makes it if it is missing (half a minute, once per version)."""
    folder = CACHE / f"{'-'.join(PACKAGES[0].split('=='))}-py{sys.version_info.major}{sys.version_info.minor}"
    if not (folder / ".ready").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with locked(CACHE / "lock"):
            if not (folder / ".ready").exists():
                subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
                install = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *PACKAGES]
                subprocess.run(install, check=True)
                (folder / ".ready").touch()
    return folder / "bin/python"
