"""Judging of what `finetune export` wrote, on rows that the user gives: the same as a job does with its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoTokenizer

from finetune_api.base import Json
from finetune_api.failures import FailureReason
from finetune_api.spec.inputs import DatasetColumns
from finetune_api.vocabulary import TrainOn
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.chat.labels import Encoded
from finetune_trainer.data.layouts import detect_format, parse_row
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.data.rows import read_rows
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.export import ExportedFile, ExportRequest
from finetune_trainer.export.gguf.families.table import is_read_back
from finetune_trainer.export.judge.measure import Candidates, measure_losses
from finetune_trainer.export.judge.rows import choose_rows
from finetune_trainer.export.judge.verdict import improvement_kept, warn_of_files

READ_ROWS = 256
"""Rows that are read at most, from the beginning of the file; those to judge on are spread over them."""
NOT_JUDGED = (
    "note: what the files keep of the training was not measured; --rows FILE does, with some of the evaluation data"
)


@dataclass(frozen=True)
class FileLosses:
    """Losses for the closing table."""

    base: float
    merged: float
    files: dict[str, float] = field(default_factory=dict)
    """By GGUF type."""
    warning: str | None = None

    def kept(self, loss: float) -> float | None:
        """Share of the improvement over the base that weights of this loss keep."""
        return improvement_kept(self.base, self.merged, loss)


def read_judged_rows(file: Path, model: Path, device: torch.device) -> list[Encoded]:
    """Encodes rows of a data file with the tokenizer in folder `model`, with loss on the answers.

    Raises TrainerError for a bad row, and if no row has an answer.
    """
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(model, trust_remote_code=False), TrainOn.RESPONSES)
    columns, layout = DatasetColumns(), None
    found: list[dict[str, list[int]]] = []

    for row in islice(read_rows((file,)), READ_ROWS):
        try:
            if row.is_broken:
                raise BadRowError(row.value)
            layout = layout or detect_format(row.value, columns)
            encoded = encoder.encode(parse_row(row.value, layout, columns))
        except BadRowError as error:
            raise TrainerError(FailureReason.INVALID_ROW, f"--rows: {row.location}: {error}") from None
        found.append({"input_ids": encoded.input_ids, "labels": encoded.labels})

    rows = choose_rows(found, device) if found else []
    if not rows:
        raise TrainerError(FailureReason.EMPTY_DATASET, f"--rows: {file} has no row with an answer")
    return rows


def judge_files(
    request: ExportRequest, files: Sequence[ExportedFile], rows: Sequence[Encoded], device: torch.device
) -> FileLosses:
    """Measures base, merged weights and every GGUF file on `rows`. Raises ExportError if they cannot be read."""
    gguf = {file.type: file.path for file in files if file.kind == "gguf"}
    merged = request.output / "merged" if request.merged is not None else None
    losses = measure_losses(Candidates(request.base, request.adapter, merged, gguf), rows, device)
    warning = warn_of_files(losses.base, losses.merged, losses.files, f"{len(rows)} rows")
    return FileLosses(losses.base, losses.merged, dict(losses.files), warning)


def check_judgeable(config: Json) -> None:
    """Raises TrainerError (UnsupportedArchitecture) for a model whose layers are not known to run one by one."""
    if not is_read_back(config):
        message = (
            f"--rows: models of type {config.get('model_type')} cannot be judged, only those whose GGUF files can be "
            "read back: leave it out"
        )
        raise TrainerError(FailureReason.UNSUPPORTED_ARCHITECTURE, message)
