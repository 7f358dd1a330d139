"""Stage 3: turns raw rows into token ids and labels, in one streaming pass.

Bad rows are collected and reported together, by file and line. Memory holds a few rows at a time: encoded rows go to an
Arrow file.
"""

import logging
from collections import Counter
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
from finetune_trainer.chat.sandbox.reasoning import Fate
from finetune_trainer.data.layouts import describe_detection, detect_format, parse_row
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.data.report_limits import MAX_TRAINING_ERROR_ROWS
from finetune_trainer.data.rows import Row, read_rows
from finetune_trainer.errors import InterruptedRunError, TrainerError

log = logging.getLogger(__name__)
FEATURES = Features({"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32"))})
WRITE_BATCH = 256
"""Rows that are in memory before they are written."""


@dataclass(frozen=True)
class DatasetFiles:
    """Raw files to train on, and those of an evaluation source, if the job names one."""

    train: tuple[Path, ...]
    evaluation: tuple[Path, ...] | None = None


@dataclass(frozen=True)
class FormattedData:
    """Encoded rows, each a datasets.Dataset with columns input_ids and labels."""

    train: Any
    evaluation: Any | None
    format: DatasetFormat
    skipped_rows: int
    """Bad rows, of training and evaluation data."""
    supervised_tokens: int
    """Tokens with loss in the training source, rows that are held out for evaluation included."""


def format_data(
    files: DatasetFiles, spec: DatasetSpec, encoder: ChatEncoder, work: Path, *, max_length: int, seed: int
) -> FormattedData:
    """Encodes every usable row, cut to `max_length` tokens, into Arrow files below `work`.

    Raises TrainerError (InvalidRow, MissingColumn, EmptyDataset, NoSupervisedTokens, ...).
    """
    disable_progress_bars()
    training = _EncodingPass(spec, encoder, max_length)
    dataset = training.write(files.train, work / "encoded.arrow")
    evaluation, skipped = None, training.bad_total

    if files.evaluation is not None:
        # An evaluation source has a layout of its own, and all its rows are used.
        uri, _ = spec.evaluation_source() or (spec.source, "")
        own_spec = spec.model_copy(update={"source": uri, "max_samples": None})
        evaluating = _EncodingPass(own_spec, encoder, max_length)
        evaluation = evaluating.write(files.evaluation, work / "evaluation.arrow")
        skipped += evaluating.bad_total
    elif spec.evaluation is not None and spec.evaluation.fraction is not None:
        dataset, evaluation = _hold_out(dataset, spec.evaluation.fraction, seed)

    return FormattedData(dataset, evaluation, training.format, skipped, training.supervised_tokens)


def _hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Splits off `fraction` of the rows, at least one; at least one stays to train on."""
    rows = len(dataset)
    if rows < 2:
        message = "spec.dataset.evaluation needs at least two usable rows: one to train on, one to hold out"
        raise TrainerError(FailureReason.EMPTY_DATASET, message)

    count = min(rows - 1, max(1, round(rows * fraction)))
    parts = dataset.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


class _EncodingPass:
    """One pass over the files of a source: writes usable rows, counts the others, and reports bad ones together."""

    def __init__(self, spec: DatasetSpec, encoder: ChatEncoder, max_length: int) -> None:
        self._spec, self._encoder, self._max_length = spec, encoder, max_length
        self.format = DatasetFormat.AUTO
        self.rows = 0
        self.supervised_tokens = 0
        self.unsupervised_rows = 0
        """Rows without a token of an answer within `max_length`."""
        self.reasoning: Counter[Fate] = Counter()
        """Answers by what the chat template made of their reasoning."""
        self.bad: list[str] = []
        """The first bad rows: where each is, and what is wrong with it."""
        self.bad_total = 0

    def write(self, files: tuple[Path, ...], path: Path) -> Dataset:
        """Encodes `files` into an Arrow file at `path`. Raises TrainerError as `format_data` does."""
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = ArrowWriter(path=str(path), features=FEATURES, writer_batch_size=WRITE_BATCH)
        for encoded in self._encode(files):
            writer.write({"input_ids": encoded.input_ids, "labels": encoded.labels})
        writer.finalize()
        writer.close()

        self._check()
        return Dataset.from_file(str(path))

    def _encode(self, files: tuple[Path, ...]) -> Iterator[Encoded]:
        """Yields the usable rows, at most maxSamples."""
        spec, layout = self._spec, self._spec.format
        for row in read_rows(files):
            try:
                if row.is_broken:
                    raise BadRowError(row.value)
                # The first good row decides for all of them.
                if layout is DatasetFormat.AUTO:
                    layout = detect_format(row.value, spec.columns)
                    log.info("dataset format: %s", describe_detection(row.value, layout, spec.columns))
                self.format = layout
                encoded = self._encoder.encode(parse_row(row.value, layout, spec.columns)).truncated(self._max_length)
            except BadRowError as error:
                self._add_bad(row, str(error))
                continue
            except InterruptedRunError:
                raise
            except TrainerError as error:  # not of this row alone: a template that is wrong, for example
                raise TrainerError(error.reason, f"{row.location}: {error.message}") from None

            if not encoded.supervised:
                self.unsupervised_rows += 1
                continue

            self.rows += 1
            self.reasoning.update(encoded.reasoning)
            self.supervised_tokens += encoded.supervised
            yield encoded
            if self.rows == spec.max_samples:
                return

    def _add_bad(self, row: Row, why: str) -> None:
        self.bad_total += 1
        if len(self.bad) < MAX_TRAINING_ERROR_ROWS:
            self.bad.append(f"{row.location}: {why}")

    def _check(self) -> None:
        """Raises TrainerError for bad rows, unless the job skips them, and for a source without a usable row."""
        if (problem := self._encoder.find_problem()) is not None:
            raise TrainerError(FailureReason.INVALID_CHAT_TEMPLATE, problem)

        if self.bad_total and self._spec.on_bad_row is OnBadRow.FAIL:
            more = f" (and {self.bad_total - len(self.bad)} more)" if self.bad_total > len(self.bad) else ""
            raise TrainerError(FailureReason.INVALID_ROW, "; ".join(self.bad) + more)

        if self.unsupervised_rows:
            log.warning(
                "%d rows are left out: no answer starts within %d tokens", self.unsupervised_rows, self._max_length
            )
        for fate in (Fate.LEFT_OUT, Fate.DOUBLED):
            if answers := self.reasoning[fate]:
                log.warning("the reasoning of %d answers is %s by the chat template", answers, fate)
        if self.rows:
            return

        if self.unsupervised_rows:
            limit = f"maxSequenceLength = {self._max_length} tokens"
            message = f"no answer starts within {limit} in any of {self.unsupervised_rows} rows"
            raise TrainerError(FailureReason.NO_SUPERVISED_TOKENS, message)
        skipped = f"; {self.bad_total} rows were skipped, the first: {self.bad[0]}" if self.bad else ""
        raise TrainerError(FailureReason.EMPTY_DATASET, f"{self._spec.source} has no usable row{skipped}")
