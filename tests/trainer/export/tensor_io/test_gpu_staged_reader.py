"""On a GPU, tensors of a checked file come through pinned buffers, and are what was written or an error."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.tensor_io.checked_tensors import DamagedFileError, open_checked, write_checked
from finetune_trainer.export.tensor_io.staged_reader import PIECE_BYTES

pytestmark = pytest.mark.gpu
GPU, ABOUT = torch.device("cuda", 0), {"model": "a" * 64}
SIZES = (0, 1, 4096, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 5 * PIECE_BYTES + 3)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    found = {f"t{size}": torch.randint(256, (size,), dtype=torch.uint8, generator=draw) for size in SIZES}
    return found | {f"wide{index}": torch.randn(2048, 1025, generator=draw).bfloat16() for index in range(20)}


def test_threads_read_at_once_what_was_written(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_checked(tmp_path / "a", tensors, ABOUT)
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            read = {name: threads.submit(each.__getitem__, ...) for name, each in
                    open_checked(tmp_path / "a", ABOUT, GPU).items()}  # fmt: skip
            found = {name: one.result() for name, one in read.items()}
            assert {value.device for value in found.values()} == {GPU}
            assert all(torch.equal(found[name].cpu(), value) for name, value in tensors.items())


@pytest.mark.parametrize("place", [0, PIECE_BYTES - 1, PIECE_BYTES, 5 * PIECE_BYTES + 2])
def test_a_byte_that_changed_is_found_wherever_it_is(
    place: int, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path, name = tmp_path / "a", f"t{SIZES[-1]}"
    write_checked(path, tensors, ABOUT)
    tensor = open_checked(path, ABOUT, GPU)[name]
    with path.open("r+b") as file:
        file.seek(tensor.stored.offset + place)
        byte = file.read(1)[0]
        file.seek(tensor.stored.offset + place)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DamagedFileError, match=f"{name} is not what was written"):
        tensor[...]


def test_a_file_that_ends_early_is_refused(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_checked(path, tensors, ABOUT)
    tensor = open_checked(path, ABOUT, GPU)["wide19"]
    with path.open("r+b") as file:
        file.truncate(tensor.stored.offset + 100)
    with pytest.raises(InvalidBaseError, match="ended while wide19 was read"):
        tensor[...]
