"""One streaming pass over the rows: all are checked, a sample is encoded. Memory is a few rows and 8 bytes per row.

Besides the sample these rows are encoded: the first of every sequence of roles, as that is what chat templates refuse,
and each row that is clearly longer than all before it, for the longest length. They do not count in the shares.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.failures import FailureReason
from finetune_api.spec.inputs import DatasetSpec
from finetune_api.vocabulary import DatasetFormat
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.chat.labels import IGNORED, Encoded
from finetune_trainer.data.layouts import Conversation, Example, describe_detection, detect_format, parse_row
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.data.rows import Row, read_rows
from finetune_trainer.data.truncation import MAX_ENCODED_CHARACTERS
from finetune_trainer.errors import TrainerError
from finetune_trainer.preflight.report import Sample, Span
from finetune_trainer.preflight.sampling import Measured, RowSample
from finetune_trainer.preflight.statistics import DuplicateCounter

SAMPLE_CHARACTERS = 4_000_000
LONGER_BY = 1.1
MAX_SHAPES = 256
REPORTED_ROWS = 100
NAMED_ROWS = 5
SHOWN_SAMPLES = 3
SHOWN_TOKENS = 600


@dataclass(frozen=True)
class RowProblem:
    """A row that cannot be used, or that made the pass end."""

    location: str
    message: str
    reason: FailureReason


@dataclass
class Scan:
    """What the pass found."""

    rows: int = 0
    bad: int = 0
    refused: int = 0
    oversized: int = 0
    rows_with_control_tokens: int = 0
    """Rows whose texts spell out control tokens."""
    control_token_examples: list[str] = field(default_factory=list)
    """The first of them, by place."""
    answers_without_end: int = 0
    """Encoded rows whose last answer the chat template ends with no control token."""
    layout: DatasetFormat | None = None
    detection: str | None = None
    """What format Auto saw."""
    problems: list[RowProblem] = field(default_factory=list)
    """The first `REPORTED_ROWS` bad rows."""
    stopped: RowProblem | None = None
    """What ended the pass early: it concerns all rows."""
    measured: RowSample = field(default_factory=lambda: RowSample(SAMPLE_CHARACTERS))
    longest: int = 0
    """Tokens of the longest encoded row, whether in the sample or not."""
    duplicates: DuplicateCounter = field(default_factory=DuplicateCounter)
    samples: list[Sample] = field(default_factory=list)


def scan_rows(
    files: tuple[Path, ...],
    spec: DatasetSpec,
    tokenizer: Any | None,
    max_length: int,
    embedding_rows: int | None = None,
) -> Scan:
    """Check every row that training would read; without a tokenizer nothing is encoded. `embedding_rows` are the
    tokens that the model knows. Never raises for a row."""
    expected = sum(path.stat().st_size for path in files)  # of packed files more follows, which halves again
    scan = Scan(measured=RowSample(SAMPLE_CHARACTERS, expected))
    encoder = ChatEncoder(tokenizer, spec.train_on, embedding_rows=embedding_rows) if tokenizer is not None else None
    scanner = _Scanner(scan, spec, tokenizer, encoder, max_length)
    for row in read_rows(files, max_characters=MAX_ENCODED_CHARACTERS):
        try:
            scanner.take(row)
        except BadRowError as error:
            scan.bad += 1
            if len(scan.problems) < REPORTED_ROWS:
                scan.problems.append(RowProblem(row.location, str(error), FailureReason.INVALID_ROW))
        except TrainerError as error:
            scan.stopped = RowProblem(row.location, error.message, error.reason)
            break
        scan.rows += 1
        if spec.max_samples is not None and scan.rows - scan.bad >= spec.max_samples:
            break
    return scan


class _Scanner:
    """Takes rows one by one."""

    def __init__(
        self, scan: Scan, spec: DatasetSpec, tokenizer: Any | None, encoder: ChatEncoder | None, max_length: int
    ) -> None:
        self._scan = scan
        self._spec = spec
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._max_length = max_length
        self._layout = spec.format
        self._shapes: set[tuple[str, ...]] = set()
        self._longest_characters = 0

    def take(self, row: Row) -> None:
        """Check a row and encode it if it is one of those. Raises BadRowError, and TrainerError for all rows."""
        if row.is_broken:
            raise BadRowError(row.value)
        if self._layout is DatasetFormat.AUTO:
            self._layout = detect_format(row.value, self._spec.columns)
            self._scan.detection = describe_detection(row.value, self._layout, self._spec.columns)
        self._scan.layout = self._layout
        example = parse_row(row.value, self._layout, self._spec.columns)
        characters, fingerprint = _fingerprint(example)
        is_oversized = characters > MAX_ENCODED_CHARACTERS
        self._scan.duplicates.add(hash((fingerprint, row.fingerprint)) if is_oversized else fingerprint)
        if self._encoder is None:
            return
        if (token := self._encoder.find_control_token(example)) is not None:
            self._scan.rows_with_control_tokens += 1
            if len(self._scan.control_token_examples) < NAMED_ROWS:
                self._scan.control_token_examples.append(f"{row.location} ({token})")
        if is_oversized:  # encoding takes a hundred times a row's size in memory
            self._scan.oversized += 1
            return
        sampled = self._scan.measured.wants(self._scan.rows)
        if sampled | self._is_new_shape(example) | self._is_longer(characters):
            self._measure(row, example, characters, self._encoder, sampled=sampled)

    def _measure(self, row: Row, example: Example, characters: int, encoder: ChatEncoder, *, sampled: bool) -> None:
        try:
            encoded = encoder.encode(example)
        except BadRowError:
            self._scan.refused += 1
            raise
        self._scan.answers_without_end = encoder.answers_without_end
        cut = encoded.truncated(self._max_length)
        self._scan.longest = max(self._scan.longest, len(encoded.input_ids))
        if sampled:
            length = len(encoded.input_ids)
            self._scan.measured.add(Measured(self._scan.rows, characters, length, cut.supervised))
        if len(self._scan.samples) < SHOWN_SAMPLES:
            self._scan.samples.append(Sample(location=row.location, spans=show_spans(cut, self._tokenizer)))

    def _is_new_shape(self, example: Example) -> bool:
        if not isinstance(example, Conversation) or len(self._shapes) >= MAX_SHAPES:
            return False
        shape = (str(bool(example.tools)), *(message["role"] for message in example.messages))
        if shape in self._shapes:
            return False
        self._shapes.add(shape)
        return True

    def _is_longer(self, characters: int) -> bool:
        if characters <= LONGER_BY * self._longest_characters:
            return False
        self._longest_characters = characters
        return True


def show_spans(encoded: Encoded, tokenizer: Any) -> tuple[Span, ...]:
    """The first `SHOWN_TOKENS` tokens as text, split where loss begins and ends."""
    spans: list[Span] = []
    run: list[int] = []
    ids, labels = encoded.input_ids[:SHOWN_TOKENS], encoded.labels[:SHOWN_TOKENS]
    flags = [label != IGNORED and index > 0 for index, label in enumerate(labels)]
    for index, token in enumerate(ids):
        run.append(token)
        if index + 1 == len(ids) or flags[index + 1] != flags[index]:
            spans.append(Span(text=str(tokenizer.decode(run)), supervised=flags[index]))
            run = []
    return tuple(spans)


def _fingerprint(example: Example) -> tuple[int, int]:
    """The example's characters (at least MAX_ENCODED_CHARACTERS + 1 where a text of it is cut), and a hash of them."""
    if not isinstance(example, Conversation):
        return len(example.text), hash(example.text)
    parts: list[Any] = []
    for message in example.messages:
        content = message.get("content") or ""
        extra = repr(sorted(message.items())) if len(message) > 2 or not isinstance(content, str) else ""
        parts += (message["role"], content, extra)
    if example.tools:
        parts.append(repr(example.tools))
    return sum(map(len, parts)), hash(tuple(parts))
