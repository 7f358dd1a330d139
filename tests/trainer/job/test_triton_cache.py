"""The pod's Triton cache gets what the image has compiled, and keeps what it has."""

from pathlib import Path

import pytest

from finetune_trainer.job.triton_cache import seed_triton_cache


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    module = tmp_path / "image/KEY/cuda_utils.so"
    module.parent.mkdir(parents=True)
    module.write_bytes(b"compiled")
    return tmp_path / "image"


def test_compiled_modules_are_copied(seed: Path, tmp_path: Path) -> None:
    assert seed_triton_cache(seed, tmp_path / "pod") == 1
    assert (tmp_path / "pod/KEY/cuda_utils.so").read_bytes() == b"compiled"


def test_whatever_the_pod_has_compiled_itself_stays(seed: Path, tmp_path: Path) -> None:
    own = tmp_path / "pod/KEY/cuda_utils.so"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"own")
    assert seed_triton_cache(seed, tmp_path / "pod") == 0
    assert own.read_bytes() == b"own"


def test_outside_the_image_nothing_is_copied(seed: Path, tmp_path: Path) -> None:
    assert seed_triton_cache(None, tmp_path / "pod") == 0
    assert seed_triton_cache(tmp_path / "absent", tmp_path / "pod") == 0
    assert seed_triton_cache(seed, None) == 0
    assert not (tmp_path / "pod").exists()
