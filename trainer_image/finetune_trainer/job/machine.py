"""The machine of a CPU run: its instructions for bfloat16 and its free memory, as Linux tells them. Without PyTorch."""

from pathlib import Path

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""CPU flags with which a training step in bfloat16 takes about half the time of one in float32."""
CPU_INFO = Path("/proc/cpuinfo")
MEMORY_INFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")


def has_bfloat16(cpu_info: Path = CPU_INFO) -> bool:
    """True if the CPU multiplies bfloat16 matrices itself; others compute such products in float32 and convert."""
    if not cpu_info.is_file():
        return False
    lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not BFLOAT16_FLAGS.isdisjoint(flags.split())


def free_memory(memory_info: Path = MEMORY_INFO, control_group: Path = CONTROL_GROUP) -> int | None:
    """Bytes of memory that a process can still take, a container's limit included; None if the system does not say."""
    if not memory_info.is_file():
        return None
    entries = (line.split() for line in memory_info.read_text(encoding="utf-8").splitlines())
    kibibytes = {entry[0]: int(entry[1]) for entry in entries if len(entry) > 1}
    available = kibibytes.get("MemAvailable:")
    if available is None:
        return None

    limit, used = (_read_number(control_group / name) for name in ("memory.max", "memory.current"))
    free = available * 1024
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _read_number(path: Path) -> int | None:
    """The number in a file; None without the file, or if it holds a word such as max."""
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None
