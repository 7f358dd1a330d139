"""Closed vocabularies of the API: every string that a machine compares, defined once."""

from enum import StrEnum
from typing import Final

from finetune_api import GROUP

JOB_NAME_LABEL: Final = f"{GROUP}/job-name"
JOB_UID_LABEL: Final = f"{GROUP}/job-uid"
COMPONENT_LABEL: Final = "app.kubernetes.io/component"
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"  # Kueue owns `suspend` of a Job that has it
QUEUE_PRIORITY_LABEL: Final = "kueue.x-k8s.io/priority-class"
TRAINER_CONTAINER: Final = "trainer"  # in preflight's pod too: it runs the same image


class Phase(StrEnum):
    """One-word summary of a job, derived from its conditions; for people and printer columns."""

    PENDING = "Pending"
    VALIDATING = "Validating"
    QUEUED = "Queued"
    RUNNING = "Running"
    EXPORTING = "Exporting"
    UPLOADING = "Uploading"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUSPENDED = "Suspended"
    CANCELLING = "Cancelling"

    @property
    def is_terminal(self) -> bool:
        """True for phases that a job never leaves."""
        return self in (Phase.SUCCEEDED, Phase.FAILED)

    @property
    def holds_gpu(self) -> bool:
        """True for phases in which the trainer's pod holds its GPUs."""
        return self in (Phase.RUNNING, Phase.EXPORTING, Phase.UPLOADING)

    @property
    def waits(self) -> bool:
        """True for phases in which a job that wants to train has no GPU yet."""
        return self in (Phase.PENDING, Phase.VALIDATING, Phase.QUEUED)


class Stage(StrEnum):
    """Stages of a job in order: the checks on a CPU, then the trainer's stages.

    The upload is a stage of its own because it can take long."""

    PREFLIGHT = "Preflight"
    MODEL_LOADING = "ModelLoading"
    ADAPTER_INJECTION = "AdapterInjection"
    DATA_FORMATTING = "DataFormatting"
    TRAINING_CONFIGURATION = "TrainingConfiguration"
    TRAINING = "Training"
    SAVING = "Saving"
    UPLOADING = "Uploading"

    @property
    def phase(self) -> Phase:
        """Phase that a job in this stage shows."""
        return {
            Stage.PREFLIGHT: Phase.VALIDATING,
            Stage.SAVING: Phase.EXPORTING,
            Stage.UPLOADING: Phase.UPLOADING,
        }.get(self, Phase.RUNNING)


class ConditionType(StrEnum):
    """Condition types; the first three follow kstatus, so that Argo CD and Flux understand them."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    VALIDATED = "Validated"
    QUEUED = "Queued"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUSPENDED = "Suspended"


class ArtifactType(StrEnum):
    """Kind of an artifact."""

    ADAPTER = "Adapter"
    MERGED = "Merged"
    GGUF = "GGUF"
    MODELFILE = "Modelfile"
    SAMPLES = "Samples"
    METRICS = "Metrics"
    MODEL_CARD = "ModelCard"
    CONFIGURATION = "Configuration"


class Quantization(StrEnum):
    """Storage type of the frozen base weights during training."""

    NF4 = "NF4"
    NONE = "None"


class DatasetFormat(StrEnum):
    """Layout of a row. Auto detects it from the columns of the first row and reports it."""

    AUTO = "Auto"
    MESSAGES = "Messages"
    SHAREGPT = "ShareGPT"
    PROMPT_COMPLETION = "PromptCompletion"
    ALPACA = "Alpaca"
    TEXT = "Text"


class ChatTemplateName(StrEnum):
    """Chat templates that come with the trainer, named after the family they belong to."""

    ALPACA = "Alpaca"
    CHATML = "ChatML"
    GEMMA = "Gemma"
    LLAMA3 = "Llama3"
    MISTRAL = "Mistral"
    PHI3 = "Phi3"
    PHI4 = "Phi4"
    QWEN = "Qwen"
    VICUNA = "Vicuna"
    ZEPHYR = "Zephyr"


class TrainOn(StrEnum):
    """Tokens that carry loss."""

    RESPONSES = "Responses"
    ALL = "All"


class OnBadRow(StrEnum):
    """Effect of an unusable row on the job."""

    FAIL = "Fail"
    SKIP = "Skip"


class AdapterVariant(StrEnum):
    """The low-rank method."""

    LORA = "LoRA"
    RSLORA = "RSLoRA"
    DORA = "DoRA"


class Optimizer(StrEnum):
    """Optimiser; the 8-bit variants hold their state block-quantised."""

    ADAMW_8BIT = "AdamW8bit"
    PAGED_ADAMW_8BIT = "PagedAdamW8bit"
    ADAMW = "AdamW"


class Scheduler(StrEnum):
    """Shape of the learning rate after warm-up."""

    LINEAR = "Linear"
    COSINE = "Cosine"
    CONSTANT = "Constant"


class Precision(StrEnum):
    """Compute type. Auto is BF16 on Ampere and later and on CPUs that multiply it, FP16 on older GPUs, FP32 on other
    CPUs. FP8 computes products with frozen weights in FP8 and everything else in BF16."""

    AUTO = "Auto"
    BF16 = "BF16"
    FP16 = "FP16"
    FP32 = "FP32"
    FP8 = "FP8"


class MemoryMode(StrEnum):
    """Use of GPU memory: Fastest stores all activations that fit, Balanced dequantises weights at each use and stores
    fewer activations, Smallest keeps layer inputs and NF4 weights in host memory and recomputes the rest."""

    FASTEST = "Fastest"
    BALANCED = "Balanced"
    SMALLEST = "Smallest"


class Parallelism(StrEnum):
    """Placement of the frozen base on several GPUs: Replicated keeps all of it on each, Sharded an equal part on each,
    and Auto shards what does not fit whole."""

    AUTO = "Auto"
    REPLICATED = "Replicated"
    SHARDED = "Sharded"


class MergedType(StrEnum):
    """Type of the merged weights; None writes none."""

    BF16 = "BF16"
    FP16 = "FP16"
    NONE = "None"


class GgufType(StrEnum):
    """GGUF file types that the exporter writes, from exact to small, with the approximate bits per weight on disk in
    brackets. _S, _M and _L keep fewer or more of the sensitive matrices in finer types, as llama.cpp does."""

    F32 = "F32"  # [32]
    F16 = "F16"  # [16]
    BF16 = "BF16"  # [16]
    Q8_0 = "Q8_0"  # [8.5]
    Q6_K = "Q6_K"  # [6.6]
    Q5_K_M = "Q5_K_M"  # [5.7]
    Q5_K_S = "Q5_K_S"  # [5.5]
    Q5_1 = "Q5_1"  # [6.0]
    Q5_0 = "Q5_0"  # [5.5]
    Q4_K_M = "Q4_K_M"  # [4.9]
    Q4_K_S = "Q4_K_S"  # [4.6]
    Q4_1 = "Q4_1"  # [5.0]
    Q4_0 = "Q4_0"  # [4.5]
    IQ4_NL = "IQ4_NL"  # [4.5]
    IQ4_XS = "IQ4_XS"  # [4.3]
    MXFP4_MOE = "MXFP4_MOE"  # [4.25 for experts, 8.5 for everything else]
    Q3_K_L = "Q3_K_L"  # [4.3]
    Q3_K_M = "Q3_K_M"  # [3.9]
    Q3_K_S = "Q3_K_S"  # [3.5]
    Q2_K = "Q2_K"  # [3.0]


class JudgedRows(StrEnum):
    """Rows that published weights are judged on: those held out for evaluation, or rows that were trained on."""

    EVALUATION = "Evaluation"
    TRAINING = "Training"


class Batching(StrEnum):
    """Arrangement of the documents of a forward pass, which keeps them apart."""

    PACKED = "Packed"
    """End to end in one row, each attending only to itself."""

    PADDED = "Padded"
    """A row each, padded on the right, with a mask: for models whose packed documents see each other."""

    SINGLE = "Single"
    """One document a pass: for models whose rows see each other, too."""


class MultiNode(StrEnum):
    """Kind of the object that makes the pods of a job on several nodes."""

    JOB = "Job"
    JOB_SET = "JobSet"


class PreflightMode(StrEnum):
    """Run or skip the checks of model, data and output on a CPU before the trainer's pod is created."""

    RUN = "Run"
    SKIP = "Skip"


class PreflightResult(StrEnum):
    """Result of preflight."""

    PASSED = "Passed"
    FAILED = "Failed"


class OnExisting(StrEnum):
    """Effect of an existing committed result at the same place on a new job."""

    REUSE = "Reuse"
    FAIL = "Fail"
    OVERWRITE = "Overwrite"
