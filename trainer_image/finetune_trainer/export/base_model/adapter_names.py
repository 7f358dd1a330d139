"""Names of an adapter's layers: as in the language model alone, where it trains, or as in transformers' class of the
whole checkpoint, where people load it.

    base_model.model.model.layers.0.self_attn.q_proj                     trained
    base_model.model.model.language_model.layers.0.self_attn.q_proj      published

peft and vLLM find the published names in the original checkpoint; vLLM maps them to its own. The target modules become
a pattern that fits the language model only: towers for images have layers of the same names.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from finetune_trainer.model.multimodal import LANGUAGE_MODEL_AT, name_in_checkpoint, name_in_language_model

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def publish_names(adapter: Path, base: Path, model_type: str) -> None:
    """Name the layers of a saved adapter as in the whole checkpoint `base`, of `model_type`."""
    _rename(adapter, adapter, lambda name: name_in_checkpoint(model_type, name))

    path = adapter / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    place = re.escape(LANGUAGE_MODEL_AT[model_type])
    targets = config["target_modules"]
    if not isinstance(targets, str):
        names = "|".join(re.escape(name) for name in sorted(targets))
        config["target_modules"] = rf"{place}(?:.*\.)?(?:{names})"
    config["base_model_name_or_path"] = str(base)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_with_trained_names(adapter: Path, target: Path) -> Path:
    """Copy a published adapter into the folder `target`, named as in the language model alone; returns `target`."""
    target.mkdir(parents=True, exist_ok=True)
    names = _rename(adapter, target, name_in_language_model)
    config: dict[str, Any] = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8"))
    layers = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in names}
    config["target_modules"] = sorted(layers)
    (target / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
    return target


def _rename(adapter: Path, target: Path, rename: Callable[[str], str]) -> list[str]:
    """Write the adapter's tensors under other names; returns them."""
    with safe_open(adapter / WEIGHTS_NAME, framework="pt") as file:
        tensors = {PREFIX + rename(name.removeprefix(PREFIX)): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    save_file(tensors, target / WEIGHTS_NAME, metadata={"format": "pt"})
    return list(tensors)
