"""TensorBoard's event file of a run, written from its metrics. Pure.

The format is small: records of a length, its checksum, a protocol buffer and its checksum, and of the protocol buffer
six fields are needed. The packages that write it were rejected: tensorboard brings 55 MB of servers (grpc, werkzeug,
pillow), tensorboardX brings protobuf, and torch.utils.tensorboard needs the first of them. Written at the end and not
step by step, the file has no gap and no step twice, however often the run was resumed.
"""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from awscrt import checksums

from finetune_trainer.training.metrics_log import MetricLine

VERSION = "brain.Event:2"
TAGS = {
    "train/loss": "loss",
    "eval/loss": "eval_loss",
    "train/learning_rate": "learning_rate",
    "train/grad_norm": "grad_norm",
    "train/epoch": "epoch",
    "train/tokens_per_second": "tokens_per_second",
    "train/gpu_memory_bytes": "gpu_memory_bytes",
}
"""Names of transformers' TensorBoardCallback, so that runs of other trainers can be shown beside ours."""
DOUBLE, FLOAT, VARINT, BYTES = 1, 5, 0, 2  # wire types of protocol buffers


def write_event_file(folder: Path, lines: Iterable[MetricLine], job: str) -> Path:
    """Writes events.out.tfevents.<time>.<job> into `folder`; returns its path."""
    listed = list(lines)
    began = listed[0].time.timestamp()
    path = folder / f"events.out.tfevents.{int(began):010d}.{job}"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(_record(event) for event in _events(began, listed)))
    return path


def _events(began: float, lines: Iterable[MetricLine]) -> Iterator[bytes]:
    """The version, then an event for every value."""
    yield _field(1, DOUBLE, struct.pack("<d", began)) + _field(3, BYTES, VERSION.encode())

    for line in lines:
        position = _field(1, DOUBLE, struct.pack("<d", line.time.timestamp())) + _field(2, VARINT, _varint(line.step))
        for tag, name in TAGS.items():
            number: float | None = getattr(line, name)
            if number is not None:
                value = _field(1, BYTES, tag.encode()) + _field(2, FLOAT, struct.pack("<f", number))
                yield position + _field(5, BYTES, _field(1, BYTES, value))  # Event.summary.value[0]


def _field(number: int, wire_type: int, content: bytes) -> bytes:
    length = _varint(len(content)) if wire_type == BYTES else b""
    return _varint(number << 3 | wire_type) + length + content


def _varint(number: int) -> bytes:
    """Seven bits a byte, lowest first; the high bit says that more follow."""
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _record(event: bytes) -> bytes:
    length = struct.pack("<Q", len(event))
    return length + _checksum(length) + event + _checksum(event)


def _checksum(data: bytes) -> bytes:
    """CRC-32C, masked as TensorFlow's record files have it."""
    crc = checksums.crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
