"""Time of merging and quantising an 8B model on this machine's GPU. Not a part of CI.

    python trainer_image/benchmarks/export_rate.py --csv FILE        # Llama-8B shape, random: 16 GB in, 29 GB out
    python trainer_image/benchmarks/export_rate.py --small           # a tiny one, also without a GPU

Measured in this order; each line of the CSV is written as soon as it is known:

* `encoder`: each type alone, from device memory to device memory.
* `write`, `read`: the exporter's own threads between the device and the folder, and nothing else.
* `besides disk`: the whole export of merged BF16 + Q4_K_M + Q8_0 (reading the base, copies to and from the device,
  merging, encoding), with the encoded bytes written to /dev/null. With base and results in memory's file system, this
  is the time of an export without disk and network; reading from memory is still in it.
* `export`: the same with files; once for each round, and a line for each type with its share of encoding.
* `every type`: all other types, a few in one pass.

GB/s count fp32 weights, 4 bytes each, for each second of encoding on the device. `differing` counts bytes that differ
from the CPU path's, over 2 million weights of each of three kinds.
"""

import argparse
import csv
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from benchmarks.provenance import current_commit, installed_versions
from finetune_api.vocabulary import GgufType
from finetune_test_models.random_model import LLAMA_8B, SMALL, Size, make_random_adapter, make_random_base
from finetune_trainer.export.adapter import open_adapter
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.export import ExportedFile, ExportRequest, export, plan_outputs, stream
from finetune_trainer.export.quantization.file_types import find_file_type
from finetune_trainer.export.quantization.floats import FLOAT_DTYPES
from finetune_trainer.export.quantization.quantize import CPU_CHUNK_WEIGHTS, quantize
from finetune_trainer.export.quantization.quantizers import QUANTIZERS
from finetune_trainer.export.tensor_io.file_writer import AppendedFile, FileWriters, Piece
from finetune_trainer.export.tensor_io.tensor_reader import read_tensors

GIGABYTE = 1e9
MERGED, GGUF = "BF16", ("Q4_K_M", "Q8_0")
OTHERS = (
    ("F32",),
    ("F16", "BF16"),
    ("Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    ("IQ4_NL", "IQ4_XS"),
    ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S"),
    ("Q5_K_S", "Q5_K_M", "Q6_K"),
)
BYTES_PER_WEIGHT = 6.3  # base and the largest outputs at once: 2 + 4, and a little
FIGURES = ("seconds", "GB/s", "written GB", "GPU GB", "host GB", "differing")
PACKAGES = ("torch", "transformers", "gguf", "numba", "numpy")
COMPARED_ROWS = 512


@dataclass
class Table:
    """Results: printed as they come, and written as CSV."""

    origin: tuple[str, ...]
    path: Path | None
    file_system: str = ""
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.path is not None:
            self._write(("what", "type", *FIGURES, "file system", "gpu", "cores", "versions", "commit"), "w")

    def add(self, what: str, kind: str, **figures: float) -> None:
        """Add one line; `figures` are named as in FIGURES, with _ for characters that a name cannot hold."""
        named = {name.replace("_", " ").replace(" per s", "/s"): float(f"{figures[name]:.4g}") for name in figures}
        unknown = named.keys() - set(FIGURES)
        if unknown:
            raise AssertionError(f"no column is called {unknown}")
        shown = "  ".join(f"{name} {value:g}" for name, value in named.items())
        print(f"[{self.seconds():5.0f} s] {what:14} {kind:22} {shown}", flush=True)
        if self.path is not None:
            self._write((what, kind, *(named.get(name, "") for name in FIGURES), self.file_system, *self.origin), "a")

    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def _write(self, line: tuple[object, ...], mode: str) -> None:
        assert self.path is not None, "only called where there is a file"
        with self.path.open(mode, newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(line)


class Discarding(FileWriters):
    """Writers that bring everything to the host in pinned buffers, as for a file, and write it to /dev/null."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._null = os.open(os.devnull, os.O_WRONLY)

    def put(self, file: int, offset: int, piece: Piece, ready: torch.cuda.Event | None = None) -> None:
        """Queue a piece as FileWriters do, for /dev/null."""
        super().put(self._null, offset, piece, ready)

    def stop(self) -> None:
        """End the threads, then close."""
        super().stop()
        if self._null >= 0:
            os.close(self._null)
            self._null = -1


def main() -> None:
    """Measure everything in the order of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--folder", type=Path, help="where base and results lie (default: memory, else TMPDIR)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300, help="no further pass over `every type` begins after")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    arguments = parser.parse_args()

    size = SMALL if arguments.small else LLAMA_8B
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    origin = (gpu, str(os.cpu_count()), installed_versions(PACKAGES), arguments.commit or current_commit())
    table = Table(origin, arguments.csv)

    measure_encoders(table, device, rows=256 if arguments.small else 16384)
    with tempfile.TemporaryDirectory(prefix="export-rate-", dir=arguments.folder or choose_folder(size)) as name:
        folder = Path(name)
        table.file_system = find_file_system(folder)
        base = make_random_base(folder / "base", size, device)
        adapter = make_random_adapter(folder / "adapter", size)
        table.add("made the base", "BF16", seconds=table.seconds())

        measure_threads(table, folder, base, device, size=4 * size.weights)
        request = ExportRequest(base, adapter, folder / "out", merged=MERGED, gguf=GGUF, name="model")
        measure_besides_disk(table, request, device)
        for number in range(arguments.rounds):
            measure_export(table, f"export {number + 1}", request, device, size)
        for kinds in OTHERS:
            if table.seconds() > arguments.seconds:
                print(f"left out for lack of time: {kinds}", flush=True)
                continue
            alone = ExportRequest(base, adapter, folder / "out", merged=None, gguf=kinds, name="model")
            measure_export(table, "every type", alone, device, size)
    compare_with_cpu(table, device)


def choose_folder(size: Size) -> Path:
    """The folder of memory's file system if base and results fit there: disks are not what is measured."""
    memory = Path("/dev/shm")  # noqa: S108  # the only name that memory has as a folder
    fits = memory.is_dir() and shutil.disk_usage(memory).free > BYTES_PER_WEIGHT * size.weights
    return memory if fits else Path(tempfile.gettempdir())


def find_file_system(folder: Path) -> str:
    """Kind of the folder's file system; memory's is tmpfs."""
    mounts = (line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines())
    return max((len(place), kind) for place, kind in mounts if folder.is_relative_to(place))[1]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tensor_types() -> list[GGMLQuantizationType]:
    """Every type that a tensor can have."""
    return sorted({find_file_type(kind.value).matrices for kind in GgufType})


def measure_encoders(table: Table, device: torch.device, *, rows: int) -> None:
    """Measure each type on normal weights: the best of three after a warm-up."""
    weights = torch.randn(rows, 4096, generator=torch.Generator(device).manual_seed(2), device=device) * 0.02
    for kind in tensor_types()[1:]:  # fp32 stays what it is
        seconds = []
        for _ in range(4):
            synchronize(device)
            began = time.perf_counter()
            quantize(weights, kind)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
        best = min(seconds[1:])
        table.add("encoder", kind.name, seconds=best, GB_per_s=weights.nbytes / best / GIGABYTE)


def measure_threads(table: Table, folder: Path, base: Path, device: torch.device, *, size: int) -> None:
    """Measure the exporter's reading and writing threads alone.

    Writing also makes a virtual machine's memory grow to the size that the export needs.
    """
    data = torch.ones(min(size, 1 << 30), dtype=torch.uint8, device=device)
    began = time.perf_counter()
    with FileWriters(device) as writers:
        file = AppendedFile(writers, folder / "probe")
        written = sum(file.append(data) for _ in range(max(1, size // data.numel())))
        file.close()
    seconds = time.perf_counter() - began
    (folder / "probe").unlink()
    table.add("write", "", seconds=seconds, written_GB=written / GIGABYTE)

    began = time.perf_counter()
    with closing(read_tensors(open_base_model(base).tensors, device)) as tensors:
        read = sum(values.nbytes for _, values in tensors)
    synchronize(device)
    table.add("read", f"{read / GIGABYTE:.2f} GB", seconds=time.perf_counter() - began)


def measure_besides_disk(table: Table, request: ExportRequest, device: torch.device) -> None:
    """Measure everything but the writing of encoded bytes to files."""
    assert request.adapter is not None, "an adapter is merged"
    began = time.perf_counter()
    base = open_base_model(request.base, adapter=request.adapter)
    adapter = open_adapter(request.adapter, base)
    partial = request.output.with_name("headers")
    partial.mkdir()

    outputs = plan_outputs(request, base, partial)
    with Discarding(device) as writers:
        stream(base, adapter, outputs, writers, on_progress=lambda done, total: None, on_tensor=lambda name: None)
    seconds = time.perf_counter() - began
    table.add("besides disk", "+".join((MERGED, *GGUF)), seconds=seconds)
    shutil.rmtree(partial)


def measure_export(table: Table, what: str, request: ExportRequest, device: torch.device, size: Size) -> None:
    """Measure one export as a whole, and each type's share of encoding on the device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    files = export(request, device=device, on_progress=lambda done, total: None)
    seconds = time.perf_counter() - began

    chosen = [kind for kind in (request.merged, *request.gguf) if kind is not None]
    memory = {"host_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIGABYTE}
    if device.type == "cuda":
        memory["GPU_GB"] = torch.cuda.max_memory_allocated() / GIGABYTE
    written = sum(file.size for file in files) / GIGABYTE
    table.add(what, "+".join(chosen), seconds=seconds, written_GB=written, **memory)

    for kind in chosen:
        for part in ("merged", "gguf"):
            named = [file for file in files if (file.type, file.kind) == (kind, part)]
            add_type(table, f"{what}: {part}", kind, named, size)
    shutil.rmtree(request.output)


def add_type(table: Table, what: str, kind: str, files: list[ExportedFile], size: Size) -> None:
    """Add a type's line, if there are files of it."""
    if files:
        encoding = sum(file.seconds for file in files)
        written = sum(file.size for file in files) / GIGABYTE
        rate = 4 * size.weights / encoding / GIGABYTE
        table.add(what, kind, seconds=encoding, GB_per_s=rate, written_GB=written)


def made_weights(device: torch.device) -> Iterator[torch.Tensor]:
    """Yield weights with thin tails, with heavy tails, and with the many ties of a 16-bit checkpoint."""
    generator = torch.Generator().manual_seed(2)
    normal = torch.randn(COMPARED_ROWS, 4096, generator=generator) * 0.02
    yield normal.to(device)
    yield (normal / torch.rand(COMPARED_ROWS, 4096, generator=generator).clamp(0.1)).to(device)
    yield normal.bfloat16().float().to(device)


def choose_cpu_path() -> tuple[str, Callable[[torch.Tensor, GGMLQuantizationType], torch.Tensor]]:
    """The compiled encoders, which quantize() uses for this many weights; torch's if numba is missing."""
    try:
        import_module("numba")
    except ImportError as error:  # also raised where NumPy is newer than it knows
        print(f"no compiled encoders here: {error}", flush=True)
    else:
        return "compiled", quantize

    def encode(weights: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
        pieces = torch.split(weights.view(-1, GGML_QUANT_SIZES[kind][0]), CPU_CHUNK_WEIGHTS // 256)
        return torch.cat([QUANTIZERS[kind].encode(piece).flatten() for piece in pieces])

    return "torch", encode


def compare_with_cpu(table: Table, device: torch.device) -> None:
    """Count the bytes of each type that differ between the device and the CPU path."""
    name, encode = choose_cpu_path()
    for kind in tensor_types():
        pairs = ((quantize(weights, kind).cpu(), encode(weights.cpu(), kind)) for weights in made_weights(device))
        differing = sum(int((ours != theirs).sum()) for ours, theirs in pairs)
        path = "torch" if kind in FLOAT_DTYPES else name
        table.add(f"as {path} CPU", kind.name, differing=differing)


if __name__ == "__main__":
    main()
