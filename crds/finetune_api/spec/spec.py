"""FineTuneJobSpec: all sections of `spec`. Ten lines are enough; everything else has a default."""

from finetune_api.base import ApiModel, Rule
from finetune_api.spec.inputs import DatasetSpec, ModelSpec
from finetune_api.spec.output import ExportSpec, OutputSpec
from finetune_api.spec.pod import PodOptions
from finetune_api.spec.run import ResourcesSpec, RunPolicySpec
from finetune_api.spec.scheduling import SchedulingSpec
from finetune_api.spec.training import UNSET_BATCH_SIZE, AdapterSpec, TrainingSpec
from finetune_api.vocabulary import Precision, Quantization

# Only these may change after creation; every other field defines what is trained.
MUTABLE_RUN_POLICY = (
    "suspend",
    "activeDeadlineSeconds",
    "maxGpuSeconds",
    "startupDeadlineSeconds",
    "ttlSecondsAfterFinished",
)
IMMUTABLE_SECTIONS = ("model", "dataset", "adapter", "training", "export", "output", "resources", "scheduling", "pod")


_SEQUENCES = (
    f"(has(self.training.batchSize) ? self.training.batchSize : {UNSET_BATCH_SIZE}) * "
    "self.training.gradientAccumulation"
)
"""Sequences of a step, in CEL; see `TrainingSpec.sequences_per_step`."""


_PROCESSES = "((self.resources.gpus > 1 ? self.resources.gpus : 1) * self.resources.nodes)"
"""Processes that train together, in CEL; see `ResourcesSpec.processes`."""

_DIVISIBLE = (
    "spec.training: batchSize x gradientAccumulation must be a multiple of spec.resources.gpus x spec.resources.nodes"
)


class FineTuneJobSpec(ApiModel):
    """Base model, data, training and output of a fine-tuning job."""

    model: ModelSpec
    """The base model."""

    dataset: DatasetSpec
    """The training data."""

    adapter: AdapterSpec = AdapterSpec()
    """The low-rank adapter."""

    training: TrainingSpec = TrainingSpec()
    """The training run."""

    export: ExportSpec = ExportSpec()
    """Artifacts to create."""

    output: OutputSpec = OutputSpec()
    """Destination of artifacts and checkpoints."""

    resources: ResourcesSpec = ResourcesSpec()
    """Resources and placement of the trainer's pod."""

    scheduling: SchedulingSpec = SchedulingSpec()
    """Queue and scheduler that decide when the trainer runs, and where."""

    pod: PodOptions = PodOptions()
    """Identity, labels, registries, proxies and authorities of the job's pods."""

    run_policy: RunPolicySpec = RunPolicySpec()
    """Retries, deadline, suspension and clean-up."""

    rules = (
        Rule(
            cel=f"({_SEQUENCES}) % {_PROCESSES} == 0",
            holds=lambda spec: spec.training.sequences_per_step() % spec.resources.processes == 0,
            message=_DIVISIBLE,
            explain=lambda spec: _explain_steps(spec.training.sequences_per_step(), spec.resources.processes),
        ),
        Rule(
            cel="self.training.precision != 'FP8' || self.model.quantization == 'NF4'",
            holds=lambda spec: (
                spec.training.precision is not Precision.FP8 or spec.model.quantization is Quantization.NF4
            ),
            message="spec.training.precision: FP8 needs spec.model.quantization: NF4, which it decodes to FP8",
        ),
        Rule(
            cel="!has(self.training.evaluationSteps) || has(self.dataset.evaluation) || has(self.training.samples)",
            holds=lambda spec: (
                spec.training.evaluation_steps is None
                or spec.dataset.evaluation is not None
                or spec.training.samples is not None
            ),
            message="spec.training.evaluationSteps needs rows or prompts: set spec.dataset.evaluation.fraction or "
            "spec.training.samples",
        ),
        Rule(
            cel="!has(self.training.earlyStopping) || (has(self.dataset.evaluation) "
            "&& has(self.training.evaluationSteps))",
            holds=lambda spec: spec.training.early_stopping is None or _evaluates_often(spec),
            message="spec.training.earlyStopping needs evaluations: set spec.dataset.evaluation.fraction and "
            "spec.training.evaluationSteps",
        ),
        Rule(
            cel="!self.training.keepBest || (has(self.dataset.evaluation) && has(self.training.evaluationSteps))",
            holds=lambda spec: not spec.training.keep_best or _evaluates_often(spec),
            message="spec.training.keepBest needs evaluations to choose from: set spec.dataset.evaluation.fraction and "
            "spec.training.evaluationSteps",
        ),
        Rule(
            cel="!has(self.training.samples) || size(self.training.samples.prompts) > 0 "
            "|| has(self.dataset.evaluation)",
            holds=lambda spec: (
                spec.training.samples is None
                or bool(spec.training.samples.prompts)
                or spec.dataset.evaluation is not None
            ),
            message="spec.training.samples needs something to ask: write prompts, or set spec.dataset.evaluation",
        ),
    )


def _explain_steps(sequences: int, processes: int) -> str:
    below = max(processes, sequences // processes * processes)
    nearest = f"{_DIVISIBLE}; it is {sequences}: write values whose product is {below} or {below + processes}"

    # A job that goes on with other GPUs keeps its steps.
    divisors = [count for count in range(1, sequences + 1) if sequences % count == 0]
    counts = [max(count for count in divisors if count < processes), *(c for c in divisors if c > processes)][:2]
    return f"{nearest}; or take {' or '.join(map(str, counts))} {'GPU' if counts == [1] else 'GPUs'} in all"


def _evaluates_often(spec: FineTuneJobSpec) -> bool:
    return spec.dataset.evaluation is not None and spec.training.evaluation_steps is not None
