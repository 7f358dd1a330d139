"""transformers 4.57, a judge of published folders: what vLLM and TGI read them with.

It lies in an environment of its own without PyTorch (150 MB, made once), and runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def read_folders(*folders: Path) -> dict[str, Any]:
    """Tokenizer and ends of each folder, as transformers 4.57 reads them; raises RuntimeError with what it says."""
    command = [str(_python()), "-c", PROGRAM, *map(str, folders)]
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
