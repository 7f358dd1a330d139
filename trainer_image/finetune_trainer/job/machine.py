"""The machine of a run: its CPU's instructions for bfloat16 and its memory, as Linux tells them. Without PyTorch."""

from pathlib import Path

from finetune_kernels.planning.rates import UNLIMITED

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""CPU flags with which a training step in bfloat16 takes about half the time of one in float32."""
CPU_INFO = Path("/proc/cpuinfo")
MEMORY_INFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")
PROCESS_BYTES = 4 << 30
"""Host memory of a trainer's process on a GPU beside what its memory plan pins. An estimate: 0.9 GiB on a CPU, and
CUDA's libraries and context; not measured yet."""
HOST_MARGIN = 0.9
"""Share of the free host memory that memory plans may pin; the rest is for rows, checkpoints and uploads."""


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
    if limit is None or used is None:
        return free
    # Files that were read count as used until others need the memory: after loading, those of the weights.
    return min(free, max(0, limit - used + _cached_files(control_group / "memory.stat")))


def host_room(free: int | None, processes: int, own: int = 0) -> int:
    """Bytes of host memory that each of a pod's processes may pin for its memory plan. `own`: what each will take
    beside; 0 if it has taken it already. `free` is None if nothing is known of the memory."""
    if free is None:
        return UNLIMITED
    return max(0, int(HOST_MARGIN * (free / processes - own)))


def _cached_files(statistics: Path) -> int:
    """Bytes of a container's file cache, which the system takes back when it needs them."""
    lines = statistics.read_text(encoding="utf-8").splitlines() if statistics.is_file() else []
    counts = dict(line.split() for line in lines if len(line.split()) == 2)
    return sum(int(counts.get(name, "0")) for name in ("active_file", "inactive_file"))


def _read_number(path: Path) -> int | None:
    """The number in a file; None without the file, or if it holds a word such as max."""
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None
