"""TensorBoard's event file, against the bytes that tensorboardX 2.6.5 writes for the same values."""

from datetime import UTC, datetime
from pathlib import Path

from finetune_trainer.documents.event_file import write_event_file
from finetune_trainer.training.metrics_log import MetricLine

# RecordWriter(...).write(Event(...).SerializeToString()) for the version and the three values below.
GOLDEN = bytes.fromhex(
    "1800000000000000a37f4b22090000000000448f401a0d627261696e2e4576656e743a32aba33345"
    "200000000000000029eda950090000000000448f4010012a130a110a0a747261696e2f6c6f73731500002040901fe91c"
    "290000000000000037ff5f00090000000000448f4010012a1c0a1a0a13747261696e2f6c6561726e696e675f72617465156f12833a7d82e8d3"
    "200000000000000029eda950090000000000928f4010ac022a120a100a096576616c2f6c6f7373150000a03f07c1cf26"
)


def test_the_bytes_are_tensorboards(tmp_path: Path) -> None:
    lines = [
        MetricLine(step=1, time=datetime.fromtimestamp(1000.5, UTC), loss=2.5, learning_rate=1e-3),
        MetricLine(step=300, time=datetime.fromtimestamp(1010.25, UTC), eval_loss=1.25),
    ]
    path = write_event_file(tmp_path, lines, "job")
    assert path.name == "events.out.tfevents.0000001000.job"
    assert path.read_bytes() == GOLDEN
