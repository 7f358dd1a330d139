"""Files that tell damage: whole whoever writes them at once, and in the form that the safetensors package reads."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_trainer.export.tensor_io import checked_tensors
from finetune_trainer.export.tensor_io.checked_tensors import DamagedFileError, open_checked, write_checked

ABOUT = {"model": "a" * 64}


def test_writers_and_readers_do_not_meet(tmp_path: Path) -> None:
    """Two write the same file again and again, and a third reads it: it is always whole."""
    path = tmp_path / "nf4" / "copy.safetensors"
    tensors = {f"t{index}": torch.randn(50, 200) for index in range(20)} | {"none": torch.empty(0, dtype=torch.int8)}
    write_checked(path, tensors, ABOUT)
    end, faults = time.monotonic() + 1.0, []

    def work(act: Any) -> None:
        while time.monotonic() < end:
            try:
                act()
            except Exception as error:  # noqa: BLE001 (told by the main thread)
                faults.append(error)

    def read() -> None:
        for name, tensor in open_checked(path, ABOUT).items():
            assert torch.equal(tensor[...], tensors[name])

    write = lambda: write_checked(path, tensors, ABOUT)  # noqa: E731
    threads = [threading.Thread(target=work, args=(act,)) for act in (write, write, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert list(path.parent.iterdir()) == [path]


def test_the_file_is_one_that_the_safetensors_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "copy.safetensors"
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(7, dtype=torch.uint8), "c": torch.randn(())}
    assert write_checked(path, tensors, ABOUT) == path.stat().st_size
    found = load_file(path)
    assert found.pop(checked_tensors.CHECKSUMS).shape == (4,)
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    with pytest.raises(DamagedFileError, match="about something else"):
        open_checked(path, {"model": "b" * 64})
    save_file(tensors, path)
    with pytest.raises(DamagedFileError, match="no checksums"):
        open_checked(path, ABOUT)
