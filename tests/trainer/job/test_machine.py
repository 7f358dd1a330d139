"""The CPU's flags and the free memory, read from files as Linux writes them."""

from pathlib import Path

import pytest

from finetune_kernels.planning.rates import UNLIMITED
from finetune_trainer.job.machine import HOST_MARGIN, free_memory, has_bfloat16, host_room

ZEN_4 = "processor\t: 0\nflags\t\t: fpu sse2 avx512f avx512_bf16 avx512vbmi\n\nprocessor\t: 1\nflags\t\t: fpu\n"
SAPPHIRE = "flags\t\t: fpu avx512f amx_bf16 amx_tile\n"
SKYLAKE = "model name\t: with avx512_bf16 in its name\nflags\t\t: fpu avx512f avx512_bf16x\n"
ARM = "Features\t: fp asimd bf16\n"


@pytest.mark.parametrize(
    ("text", "has"), [(ZEN_4, True), (SAPPHIRE, True), (SKYLAKE, False), (ARM, False), ("", False)]
)
def test_bfloat16_is_a_flag(tmp_path: Path, text: str, has: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert has_bfloat16(tmp_path / "cpuinfo") is has


def test_another_system_says_nothing(tmp_path: Path) -> None:
    assert not has_bfloat16(tmp_path / "cpuinfo")
    assert free_memory(tmp_path / "meminfo", tmp_path) is None


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8 << 20),
        ({"memory.max": "max\n", "memory.current": "5"}, 8 << 20),
        ({"memory.max": str(3 << 20), "memory.current": str(1 << 20)}, 2 << 20),
        ({"memory.max": str(64 << 20), "memory.current": "0"}, 8 << 20),
        ({"memory.max": "1000", "memory.current": "2000"}, 0),
        (
            {
                "memory.max": str(3 << 20),
                "memory.current": str(3 << 20),
                "memory.stat": "anon 1\nfile 2097152\nshmem 4096\ninactive_file 1572864\nactive_file 4096\n",
            },
            1572864 + 4096,
        ),
    ],
    ids=["no container", "no limit", "a limit", "a limit above the machine", "over the limit", "full of read files"],
)
def test_free_memory_is_that_of_the_container(tmp_path: Path, files: dict[str, str], free: int) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       16384 kB\nMemAvailable:    8192 kB\nHugePages_Total:   0\n")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path / "meminfo", tmp_path) == free


def test_the_processes_of_a_pod_share_its_memory() -> None:
    assert host_room(None, 2) == UNLIMITED
    assert host_room(100, 1) == int(100 * HOST_MARGIN)
    assert host_room(100, 2, own=10) == int(40 * HOST_MARGIN)
    assert host_room(100, 2, own=60) == 0
