"""Model folders made to hurt: each is refused with a reason, none runs its code, and nothing is left behind.

The canary is a file that the folder's code or pickle would write.
"""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.errors import TrainerError
from finetune_trainer.export.export import ExportRequest, export

Hurt = Callable[[Path], None]


class Bomb:
    """Writes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def set_config(**changes: Any) -> Hurt:
    def hurt(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return hurt


def set_index(weight_map: Any) -> Hurt:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))  # type: ignore[return-value]


def write(name: str, content: str) -> Hurt:
    return lambda folder: (folder / name).write_text(content)  # type: ignore[return-value]


def change_header(change: Callable[[dict[str, Any]], Any]) -> Hurt:
    """Rewrite the header of model.safetensors; the data stay."""

    def hurt(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        text = json.dumps(change(header) or header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return hurt


def first(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = header["lm_head.weight"]
    return found


def lie(**fields: Any) -> Hurt:
    return change_header(lambda header: first(header).update(fields))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "canary")))


def pickle_in_disguise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(folder.parent / "canary")))


def own_code(folder: Path) -> None:
    code = f"import pathlib\npathlib.Path({str(folder.parent / 'canary')!r}).touch()\n"
    for module in ("modeling_own.py", "configuration_own.py"):
        (folder / module).write_text(code)
    maps = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    set_config(auto_map=maps, model_type="own")(folder)


HOSTILE: dict[str, tuple[Hurt, str]] = {
    "pickled weights": (pickled, "pickled"),
    "a pickle called safetensors": (pickle_in_disguise, "not a safetensors file"),
    "code of its own": (own_code, "cannot read"),
    "a shard outside": (set_index({"a": "../outside.safetensors"}), "which the model's folder lacks"),
    "a shard by its absolute path": (set_index({"a": "/etc/hostname"}), "which the model's folder lacks"),
    "a shard that is the folder": (set_index({"a": ".."}), "which the model's folder lacks"),
    "an index of a list": (set_index(["model.safetensors"]), "no weight_map"),
    "an index of numbers": (set_index({"lm_head.weight": 7}), "no weight_map"),
    "an index that is no JSON": (write("model.safetensors.index.json", "{"), "not valid JSON"),
    "an index of missing tensors": (set_index({"no.such": "model.safetensors"}), "its files lack"),
    "a header of 2^63 bytes": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}"), "not a safetensors file"),
    "a header that is a list": (change_header(lambda header: [1]), "no JSON object"),
    "an entry that is a list": (change_header(lambda header: {"a": [1]}), "stored as None"),
    "a header of many brackets": (
        lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10**6) + b"[" * 10**6),
        "damaged safetensors header"),
    "a tensor beyond the file": (lie(data_offsets=[0, 2**60]), "damaged"),
    "a tensor of the wrong size": (lie(shape=[2**40, 2**40]), "damaged"),
    "a negative shape": (lie(shape=[-512, -256]), "damaged"),
    "a shape of words": (lie(shape=["512", "256"]), "damaged"),
    "offsets in reverse": (lie(data_offsets=[262144, 0]), "damaged"),
    "tensors that share bytes": (
        change_header(lambda header: header.update(twin=first(header))), "share bytes"),
    "8-bit weights": (lie(dtype="I16"), "stored as I16"),
    "a config that is no JSON": (write("config.json", "{"), "not valid JSON"),
    "a config that is a list": (write("config.json", "[]"), "no JSON object"),
    "a config of many brackets": (write("config.json", "[" * 10**6), "not valid JSON"),
    "a hidden size in words": (set_config(hidden_size="many"), "hidden_size"),
    "a list of heads": (set_config(num_attention_heads=[4]), "num_attention_heads"),
    "a thousand million layers": (set_config(num_hidden_layers=10**9), "layers"),
    "a vocabulary of 10^12": (set_config(vocab_size=10**12), "vocab_size"),
    "another vocabulary": (set_config(vocab_size=1000), "has shape"),
    "a negative context": (set_config(max_position_embeddings=-1), "max_position_embeddings"),
    "another activation": (set_config(hidden_act="gelu"), "llama.cpp computes silu"),
    "RoPE of no kind": (set_config(rope_parameters={"rope_type": "own", "rope_theta": 1e4}), "own"),
    "a tokenizer that is none": (write("tokenizer.json", '{"model": 3}'), "is not a tokenizer"),
    "tokenizer settings in a list": (write("tokenizer_config.json", "[1]"), "no JSON object"),
    "a generation config that is no JSON": (write("generation_config.json", "{"), "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("hurt", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_is_refused_with_the_reason(tiny_base: Path, tmp_path: Path, hurt: Hurt, reason: str) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    hurt(folder)
    with pytest.raises(TrainerError, match=reason):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "canary").exists()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def run(base: Path, output: Path) -> None:
    request = ExportRequest(base=base, adapter=None, output=output, merged="BF16", gguf=("Q8_0",), name="m")
    export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)


def test_code_beside_a_known_architecture_is_neither_run_nor_passed_on(tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    own_code(folder)
    set_config(model_type="llama")(folder)
    run(folder, tmp_path / "out")
    assert not (tmp_path / "canary").exists()
    assert "auto_map" not in json.loads((tmp_path / "out/merged/config.json").read_text())
    assert not list((tmp_path / "out").rglob("*.py"))


def test_the_canary_sings_where_a_pickle_is_loaded(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()
