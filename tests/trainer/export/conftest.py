"""Adapters for the exporter, and the `finetune` program."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

MakeAdapter = Callable[..., Path]
Finetune = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def make_adapter() -> MakeAdapter:
    """Builder of an adapter with random, not zero, B matrices."""

    def make(base: Path, target: Path, **options: Any) -> Path:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "v_proj"], **options))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        adapted.save_pretrained(target)
        return target

    return make


@pytest.fixture
def finetune() -> Finetune:
    """Runs the console script."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).parent / "finetune"
        words = [str(program), *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)

    return run
