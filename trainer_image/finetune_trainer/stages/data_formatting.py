"""Stage 3: raw rows to token ids and labels, in one streaming pass, on disk.

Bad rows are collected and reported together, by file and line. Memory stays at a few rows: encoded rows go to an
Arrow file.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Sequence, Value, disable_progress_bars
from datasets.arrow_writer import ArrowWriter

from finetune_api.failures import FailureReason
from finetune_api.spec.inputs import DatasetSpec
from finetune_api.vocabulary import DatasetFormat, OnBadRow
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.chat.labels import Encoded
from finetune_trainer.data.layouts import describe_detection, detect_format, parse_row
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.data.report_limits import MAX_TRAINING_ROWS
from finetune_trainer.data.rows import Row, read_rows
from finetune_trainer.errors import TrainerError

log = logging.getLogger(__name__)
FEATURES = Features({"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32"))})
WRITE_BATCH = 256


@dataclass(frozen=True)
class FormattedData:
    """Encoded rows: columns input_ids and labels."""

    train: Any
    """datasets.Dataset."""
    evaluation: Any | None
    format: DatasetFormat
    skipped_rows: int
    supervised_tokens: int
    """Tokens with loss in the training rows, and in rows held out from them."""


class _Counts:
    """What one pass found."""

    def __init__(self) -> None:
        self.rows = 0
        self.supervised = 0
        self.unsupervised_rows = 0
        self.bad: list[str] = []
        self.bad_total = 0
        self.format = DatasetFormat.AUTO

    def add_bad(self, row: Row, why: str) -> None:
        self.bad_total += 1
        if len(self.bad) < MAX_TRAINING_ROWS:
            self.bad.append(f"{row.location}: {why}")


def format_data(
    files: tuple[Path, ...],
    spec: DatasetSpec,
    tokenizer: Any,
    work: Path,
    *,
    max_length: int,
    seed: int,
    held_out: tuple[Path, ...] | None = None,
    embedding_rows: int | None = None,
) -> FormattedData:
    """Encode every usable row into Arrow files below `work`; `held_out` are the files of an evaluation source,
    `embedding_rows` the tokens that the model knows. Raises TrainerError (InvalidRow, MissingColumn, EmptyDataset,
    NoSupervisedTokens, ...)."""
    counts = _Counts()
    encoder = ChatEncoder(tokenizer, spec.train_on, embedding_rows=embedding_rows)
    disable_progress_bars()
    dataset = _encode_files(files, spec, encoder, work / "encoded.arrow", max_length, counts)
    evaluation, skipped = None, counts.bad_total
    if held_out is not None:
        uri, _ = spec.evaluation_source() or (spec.source, "")
        own = spec.model_copy(update={"source": uri, "max_samples": None})
        of_evaluation = _Counts()
        evaluation = _encode_files(held_out, own, encoder, work / "evaluation.arrow", max_length, of_evaluation)
        skipped += of_evaluation.bad_total
    elif spec.evaluation is not None and spec.evaluation.fraction is not None:
        if counts.rows < 2:
            message = "spec.dataset.evaluation needs at least two usable rows: one to train on, one to hold out"
            raise TrainerError(FailureReason.EMPTY_DATASET, message)
        share = min(counts.rows - 1, max(1, round(counts.rows * spec.evaluation.fraction)))
        parts = dataset.train_test_split(test_size=share, seed=seed)
        dataset, evaluation = parts["train"], parts["test"]
    return FormattedData(dataset, evaluation, counts.format, skipped, counts.supervised)


def _encode_files(
    files: tuple[Path, ...], spec: DatasetSpec, encoder: ChatEncoder, path: Path, max_length: int, counts: _Counts
) -> Dataset:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrowWriter(path=str(path), features=FEATURES, writer_batch_size=WRITE_BATCH)
    for encoded in _encode_rows(files, spec, encoder, max_length, counts):
        writer.write({"input_ids": encoded.input_ids, "labels": encoded.labels})
    writer.finalize()
    writer.close()
    _check(counts, spec, max_length)
    return Dataset.from_file(str(path))


def _encode_rows(
    files: tuple[Path, ...], spec: DatasetSpec, encoder: ChatEncoder, max_length: int, counts: _Counts
) -> Iterator[Encoded]:
    layout = spec.format
    for row in read_rows(files):
        try:
            if row.is_broken:
                raise BadRowError(row.value)
            if layout is DatasetFormat.AUTO:
                layout = detect_format(row.value, spec.columns)
                log.info("dataset format: %s", describe_detection(row.value, layout, spec.columns))
            counts.format = layout
            encoded = encoder.encode(parse_row(row.value, layout, spec.columns)).truncated(max_length)
        except BadRowError as error:
            counts.add_bad(row, str(error))
            continue
        except TrainerError as error:
            raise TrainerError(error.reason, f"{row.location}: {error.message}") from None
        if not encoded.supervised:
            counts.unsupervised_rows += 1
            continue
        counts.rows += 1
        counts.supervised += encoded.supervised
        yield encoded
        if counts.rows == spec.max_samples:
            return


def _check(counts: _Counts, spec: DatasetSpec, max_length: int) -> None:
    if counts.bad_total and spec.on_bad_row is OnBadRow.FAIL:
        more = f" (and {counts.bad_total - len(counts.bad)} more)" if counts.bad_total > len(counts.bad) else ""
        raise TrainerError(FailureReason.INVALID_ROW, "; ".join(counts.bad) + more)
    if counts.unsupervised_rows:
        log.warning(
            "%d rows are left out: no token of an answer is within %d tokens", counts.unsupervised_rows, max_length
        )
    if counts.rows:
        return
    if counts.unsupervised_rows:
        limit = f"maxSequenceLength = {max_length} tokens"
        message = f"in none of {counts.unsupervised_rows} rows an answer begins within {limit}"
        raise TrainerError(FailureReason.NO_SUPERVISED_TOKENS, message)
    skipped = f"; {counts.bad_total} rows were skipped, the first: {counts.bad[0]}" if counts.bad else ""
    raise TrainerError(FailureReason.EMPTY_DATASET, f"{spec.source} has no usable row{skipped}")
