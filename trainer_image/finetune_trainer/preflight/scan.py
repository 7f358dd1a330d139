"""Scans the rows in one streaming pass: all are checked, a sample is encoded. Memory is a few rows and 8 bytes per row.

Besides the sample two kinds of rows are encoded: the first of every sequence of roles, as that is what chat templates
refuse, and each row that is clearly longer than all before it, for the longest length. They do not count in the shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.failures import FailureReason
from finetune_api.spec.inputs import DatasetSpec
from finetune_api.vocabulary import DatasetFormat
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.chat.labels import IGNORED, Encoded
from finetune_trainer.chat.new_tokens import new_token_ids
from finetune_trainer.data.layouts import Conversation, Example, describe_detection, detect_format, parse_row
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.data.report_limits import MAX_EXAMPLE_ROWS, MAX_REPORT_ROWS
from finetune_trainer.data.rows import Row, read_rows
from finetune_trainer.data.truncation import MAX_ENCODED_CHARACTERS
from finetune_trainer.errors import TrainerError
from finetune_trainer.preflight.report import LabelledText, Sample
from finetune_trainer.preflight.sampling import MeasuredRow, RowSample
from finetune_trainer.preflight.statistics import DuplicateCounter
from finetune_trainer.preflight.tallies.messages import MessageTally
from finetune_trainer.preflight.tallies.new_tokens import NewTokenTally
from finetune_trainer.preflight.tallies.reasoning import ReasoningTally

SAMPLE_CHARACTERS = 4_000_000
LONGER_BY = 1.1
MAX_SHAPES = 256
SHOWN_SAMPLES = 3
SHOWN_TOKENS = 600


@dataclass(frozen=True)
class RowProblem:
    """A row that cannot be used, or that ended the pass."""

    location: str
    message: str
    reason: FailureReason


@dataclass
class Scan:
    """Counts and findings of the pass."""

    rows: int = 0
    bad: int = 0
    refused: int = 0
    oversized: int = 0

    rows_with_control_tokens: int = 0
    """Rows whose texts contain control tokens."""

    control_token_examples: list[str] = field(default_factory=list)
    """The first of these rows, each with its location and a token: rows.jsonl:2 (<|im_end|>)."""

    answers_without_end: int = 0
    """Encoded rows whose last answer the chat template ends without a control token."""

    reasoning: ReasoningTally = field(default_factory=ReasoningTally)
    messages: MessageTally = field(default_factory=MessageTally)
    new_tokens: NewTokenTally = field(default_factory=lambda: NewTokenTally({}))

    layout: DatasetFormat | None = None

    detection: str | None = None
    """The format that Auto detected, and by which columns."""

    problems: list[RowProblem] = field(default_factory=list)
    """The first `MAX_REPORT_ROWS` bad rows."""

    stopped: RowProblem | None = None
    """The error that ended the pass early, as it concerns all rows."""

    template_problem: str | None = None
    """The reason why the chat template takes no row at all, if it refused each that was encoded."""

    measured: RowSample = field(default_factory=lambda: RowSample(SAMPLE_CHARACTERS))

    max_length: int = 0
    """Tokens of the longest encoded row, in the sample or not."""

    duplicates: DuplicateCounter = field(default_factory=DuplicateCounter)
    samples: list[Sample] = field(default_factory=list)

    @property
    def unlisted_bad(self) -> int:
        """Bad rows beyond those in `problems`."""
        return self.bad - len(self.problems)


def scan_rows(
    files: tuple[Path, ...],
    spec: DatasetSpec,
    tokenizer: Any | None,
    max_length: int,
    embedding_rows: int | None = None,
    new_tokens: Sequence[str] = (),
) -> Scan:
    """Checks every row that training would read; without a tokenizer nothing is encoded. Never raises for a row.

    `max_length`: tokens to which training truncates a row. `embedding_rows`: token ids that the model knows.
    `new_tokens`: those that the job added to the tokenizer.
    """
    # Compressed files hold more rows than their size suggests; the sampler then thins its sample again.
    expected = sum(path.stat().st_size for path in files)
    scan = Scan(measured=RowSample(SAMPLE_CHARACTERS, expected))
    if tokenizer is not None:
        added = dict(zip(new_tokens, new_token_ids(tokenizer, new_tokens), strict=True))
        scan.new_tokens = NewTokenTally(added, str(tokenizer.chat_template))
    encoder = ChatEncoder(tokenizer, spec.train_on, embedding_rows=embedding_rows) if tokenizer is not None else None
    scanner = _Scanner(scan, spec, tokenizer, encoder, max_length)

    for row in read_rows(files, max_characters=MAX_ENCODED_CHARACTERS):
        try:
            scanner.take(row)
        except BadRowError as error:
            scan.bad += 1
            if len(scan.problems) < MAX_REPORT_ROWS:
                scan.problems.append(RowProblem(row.location, str(error), FailureReason.INVALID_ROW))
        except TrainerError as error:
            scan.stopped = RowProblem(row.location, error.message, error.reason)
            break

        scan.rows += 1
        if spec.max_samples is not None and scan.rows - scan.bad >= spec.max_samples:
            break

    scan.template_problem = encoder.find_problem() if encoder is not None else None
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
        self._max_characters = 0
        self._unknown = _unknown_token(tokenizer) if tokenizer is not None else None

    def take(self, row: Row) -> None:
        """Checks a row, and encodes it if it is one of those that are encoded.

        Raises BadRowError for this row, TrainerError for an error that concerns all rows.
        """
        example = self._parse(row)

        # Of a truncated row only the beginning is in the example; its own fingerprint tells the rest.
        characters, fingerprint = _fingerprint(example)
        is_oversized = characters > MAX_ENCODED_CHARACTERS
        self._scan.duplicates.add(hash((fingerprint, row.fingerprint)) if is_oversized else fingerprint)
        if isinstance(example, Conversation):
            self._scan.messages.add(row.location, example, self._spec.train_on)
        self._scan.new_tokens.add(example)
        if self._encoder is None:
            return

        if (token := self._encoder.find_control_token(example)) is not None:
            self._scan.rows_with_control_tokens += 1
            if len(self._scan.control_token_examples) < MAX_EXAMPLE_ROWS:
                self._scan.control_token_examples.append(f"{row.location} ({token})")

        if is_oversized:  # encoding takes a hundred times a row's size in memory
            self._scan.oversized += 1
            return

        # No short circuit: both checks also remember this row.
        is_sampled = self._scan.measured.wants(self._scan.rows)
        if is_sampled | self._is_new_shape(example) | self._is_longer(characters):
            self._measure(row, example, characters, self._encoder, is_sampled=is_sampled)

    def _parse(self, row: Row) -> Example:
        """The row's example; the first row decides the layout if the job leaves it open."""
        if row.is_broken:
            raise BadRowError(row.value)

        if self._layout is DatasetFormat.AUTO:
            self._layout = detect_format(row.value, self._spec.columns)
            self._scan.detection = describe_detection(row.value, self._layout, self._spec.columns)
        self._scan.layout = self._layout
        return parse_row(row.value, self._layout, self._spec.columns)

    def _measure(self, row: Row, example: Example, characters: int, encoder: ChatEncoder, *, is_sampled: bool) -> None:
        """Encodes a row and notes its lengths."""
        try:
            encoded = encoder.encode(example)
        except BadRowError:
            self._scan.refused += 1
            raise

        self._scan.new_tokens.add_encoded(encoded.input_ids)
        self._scan.reasoning.add(row.location, encoded.reasoning)
        self._scan.answers_without_end = encoder.answers_without_end
        truncated = encoded.truncated(self._max_length)
        length = len(encoded.input_ids)
        self._scan.max_length = max(self._scan.max_length, length)

        if is_sampled:
            unknown = encoded.input_ids.count(self._unknown) if self._unknown is not None else 0
            self._scan.measured.add(MeasuredRow(self._scan.rows, characters, length, truncated.supervised, unknown))
        if len(self._scan.samples) < SHOWN_SAMPLES:
            self._scan.samples.append(Sample(location=row.location, spans=label_text(truncated, self._tokenizer)))

    def _is_new_shape(self, example: Example) -> bool:
        """True for the first conversation with this sequence of roles, some of which may call tools."""
        if not isinstance(example, Conversation) or len(self._shapes) >= MAX_SHAPES:
            return False
        roles = (message["role"] + ("()" if "tool_calls" in message else "") for message in example.messages)
        shape = (str(bool(example.tools)), *roles)
        if shape in self._shapes:
            return False
        self._shapes.add(shape)
        return True

    def _is_longer(self, characters: int) -> bool:
        """True for a row that is clearly longer than all before it."""
        if characters <= LONGER_BY * self._max_characters:
            return False
        self._max_characters = characters
        return True


def _unknown_token(tokenizer: Any) -> int | None:
    """Id of the token for unknown text; None if there is none, or if it is also an end (GPT-2)."""
    number: int | None = tokenizer.unk_token_id
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return None if number in others else number


def label_text(encoded: Encoded, tokenizer: Any) -> tuple[LabelledText, ...]:
    """The first `SHOWN_TOKENS` tokens as text, split where loss begins and ends."""
    texts: list[LabelledText] = []
    run: list[int] = []
    ids, labels = encoded.input_ids[:SHOWN_TOKENS], encoded.labels[:SHOWN_TOKENS]
    # The first token never carries loss, as nothing predicts it.
    has_loss = [label != IGNORED and index > 0 for index, label in enumerate(labels)]

    for index, token in enumerate(ids):
        run.append(token)
        if index + 1 == len(ids) or has_loss[index + 1] != has_loss[index]:
            texts.append(LabelledText(text=str(tokenizer.decode(run)), supervised=has_loss[index]))
            run = []
    return tuple(texts)


def _fingerprint(example: Example) -> tuple[int, int]:
    """The example's characters, and a hash of them; a truncated text is still longer than MAX_ENCODED_CHARACTERS."""
    if not isinstance(example, Conversation):
        return len(example.text), hash(example.text)

    parts: list[Any] = []
    for message in example.messages:
        # Most messages are a role and text only; of the others all fields count.
        content = message.get("content") or ""
        extra = repr(sorted(message.items())) if len(message) > 2 or not isinstance(content, str) else ""
        parts += (message["role"], content, extra)
    if example.tools:
        parts.append(repr(example.tools))

    return sum(map(len, parts)), hash(tuple(parts))
