"""The report as data: the content of `report.json`."""

from enum import StrEnum

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.failures import ExitCode, FailureReason, ends_the_job, exit_code_of
from finetune_api.run_config import GpuHourPrice
from finetune_api.vocabulary import DatasetFormat, MemoryMode, Parallelism


class Severity(StrEnum):
    """The weight of a finding: an error stops the job."""

    ERROR = "Error"
    WARNING = "Warning"


class Finding(ApiModel):
    """Something to change."""

    severity: Severity

    location: str = Field(alias="place")
    """Field of the manifest (spec.model.source), or file and line of a row (chat.jsonl:17)."""

    message: str

    reason: FailureReason | None = None
    """Reason with which the job would fail; None for warnings."""

    @classmethod
    def error(cls, location: str, message: str, reason: FailureReason) -> "Finding":
        """An error. A location that the message repeats at its beginning is removed from the message."""
        said = message.removeprefix(f"{location}: ")
        return cls(severity=Severity.ERROR, location=location, message=said, reason=reason)

    @classmethod
    def warning(cls, location: str, message: str) -> "Finding":
        """A warning."""
        return cls(severity=Severity.WARNING, location=location, message=message)


class HistogramBin(ApiModel):
    """Rows with `first` to `last` tokens, both included."""

    first: int
    last: int
    rows: int


class TokenStatistics(ApiModel):
    """Token lengths of the rows that were encoded, before they are truncated to maxSequenceLength."""

    rows: int
    p50: int
    p95: int
    max: int

    truncated_share: float
    """Share of rows longer than maxSequenceLength."""

    supervised_share: float
    """Share of tokens with loss among those that are left after truncation."""

    unsupervised_row_share: float
    """Share of rows that training skips, as no token with loss is left after truncation."""

    histogram: tuple[HistogramBin, ...]


class LabelledText(ApiModel):
    """Text of consecutive tokens that all carry loss, or all do not."""

    text: str
    supervised: bool


class Sample(ApiModel):
    """One rendered row, shortened for reading."""

    location: str = Field(alias="place")
    spans: tuple[LabelledText, ...]


class RowCounts(ApiModel):
    """Counts over all rows."""

    total: int
    bad: int
    duplicates: int
    duplicates_complete: bool

    oversized: int
    """Rows whose text is too long to be encoded here; training truncates them."""

    refused: int
    """Encoded rows that the chat template refuses; `bad` counts them, too."""


class PlanRow(ApiModel):
    """One line of the memory plan."""

    name: str
    value: str


class GpuEstimate(ApiModel):
    """The run's needs of its GPU, by the memory plan."""

    name: str

    memory_bytes: int | None = None
    """All of the GPU's memory; None if the job does not say which GPU it is."""

    mode: MemoryMode
    """The plan's choice: the job's own if it fits."""

    peak_bytes: int

    smallest_bytes: int
    """Peak with memory: Smallest."""

    plan: tuple[PlanRow, ...] = ()
    tokens_per_second: float | None = None

    why_no_speed: str | None = None
    """The reason if the speed is not known."""

    gpus: int = 1
    """GPUs that train together, each with the memory of the plan."""

    parallelism: Parallelism = Parallelism.REPLICATED
    """Whether each of them keeps the whole base model."""

    hours: float | None = None
    """Hours of training on all of them, without loading, export and upload."""

    price: GpuHourPrice | None = None
    """Price of one GPU for an hour; None if the job has none."""

    watts: int | None = None
    """Most power that one GPU takes."""


class WeightCoverage(ApiModel):
    """Shares of the layers' weights, embeddings and head apart."""

    adapted_share: float
    """Share with an adapter."""

    quantized_share: float
    """Share in NF4."""

    missing_targets: tuple[str, ...] = ()
    """Default targets that the model lacks."""

    own_targets: tuple[str, ...] = ()
    """All linear layers of a model that has none of the default's names: its default targets."""

    stacked_bytes: int
    """Bytes of experts in 3-D tensors that the kernels do not know, which get no adapter and stay in 16 bits."""

    expert_share: float = 0.0
    """Share of the experts that the kernels know."""

    loaded_bytes: int
    """Bytes of all weights once they are loaded, adapters included."""


class Report(ApiModel):
    """All that preflight found."""

    job: str
    model_source: str
    model_revision: str | None = None
    architecture: str | None = None
    dataset_source: str
    dataset_digest: str | None = None
    dataset_format: DatasetFormat | None = None

    dataset_detection: str | None = None
    """The format that Auto detected, and by which columns."""

    max_sequence_length: int
    rows: RowCounts | None = None
    tokens: TokenStatistics | None = None

    tokens_complete: bool = True
    """True if every row was encoded; otherwise shares are those of an evenly spread sample."""

    optimizer_steps: int | None = None

    epochs: float | None = None
    """Passes over the data in all steps."""

    training_tokens: int | None = None
    """Tokens that go through the model in all steps."""

    coverage: WeightCoverage | None = None
    """None if the weights' headers could not be read, or their names tell nothing about the layers."""

    published_weights: str | None = None
    """What is copied and what is decoded of the model's weights; None for a language model in 16 bits."""

    new_tokens: str | None = None
    """What the job's new tokens make of the vocabulary; None without any."""

    cpu_advice: str | None = None
    """Setting with which a CPU run would be faster."""

    gpu: GpuEstimate | None = None
    findings: tuple[Finding, ...] = ()

    more_errors: int = 0
    """Bad rows beyond those that `findings` lists."""

    samples: tuple[Sample, ...] = ()

    def errors(self) -> tuple[Finding, ...]:
        """Findings that stop the job."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.ERROR)

    def error_count(self) -> int:
        """Number of errors, listed or not."""
        return len(self.errors()) + self.more_errors

    def warnings(self) -> tuple[Finding, ...]:
        """The other findings."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.WARNING)

    def reason(self) -> FailureReason | None:
        """The reason that decides the exit code: a permanent error, which waiting does not mend, comes first."""
        reasons = [finding.reason for finding in self.errors() if finding.reason is not None]
        return next((reason for reason in reasons if ends_the_job(reason)), next(iter(reasons), None))

    def exit_code(self) -> ExitCode:
        """Exit code of the process."""
        reason = self.reason()
        return ExitCode.SUCCESS if reason is None else exit_code_of(reason)
