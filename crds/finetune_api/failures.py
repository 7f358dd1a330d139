"""The failure table, shared by the trainer, which exits with a code, and the operator, which acts on it.

The exit code of the trainer's container, never the reason, decides what follows. The Job controller acts on it by the
`podFailurePolicy` of the Job, even while the operator is down:

    how the pod ended                                        what follows                               action
    10 to 17: configuration, data, access, memory, ...       the job fails at once                      FailJob
    30: stopped; or evicted, preempted, its node lost        another pod, which counts as no retry      Ignore
    31, 32: stalled, or the loss diverged                    another pod, once for each reason          Ignore
    20, 40 and every other code; killed by a signal (128+n)  another pod, at most maxRetries of them    Count

Of 31 and 32, the Job controller cannot count to one: it makes another pod each time, after 10 s or more. The operator
counts, and fails the job when the second pod ends for the same reason. Neither counts towards maxRetries.

Memory is an exception. A trainer that notices that it runs out of memory exits with 13, and the job fails at once. A
trainer that the kernel kills for its memory has the exit code of every kill (137), which the Job controller counts; so
the operator, which sees the reason `OOMKilled`, fails the job and ends its Job. Both have the reason OutOfMemory.

The reason is for machines; the hint tells people what to change. Codes stay below 64 so that they never look like a
signal or a shell error.
"""

from dataclasses import dataclass
from enum import StrEnum

from finetune_api.pod_ends.exit_codes import (
    RESTARTED_ONCE,
    ExitCode,
    PodFailureAction,
    action_after,
    exit_codes_with,
)
from finetune_api.pod_ends.failure_reasons import FailureReason

__all__ = [
    "FAILURES",
    "RESTARTED_ONCE",
    "Consequence",
    "ExitCode",
    "FailureClass",
    "FailureReason",
    "PodFailureAction",
    "action_after",
    "ends_the_job",
    "exit_code_of",
    "exit_codes_with",
]


class Consequence(StrEnum):
    """Consequence of a failure for the job, in words for people."""

    JOB_FAILS = "the job fails at once"
    NEW_POD = "another pod starts, which counts as no retry"
    RETRY = "another pod starts, at most spec.runPolicy.maxRetries times"
    ONCE = "another pod goes on from the last checkpoint, once; the second time the job fails"
    QUEUES = "the job waits, at most spec.runPolicy.startupDeadlineSeconds"
    WAITS = "the job waits, with condition Stalled, at most spec.runPolicy.startupDeadlineSeconds"


_CONSEQUENCES = {
    PodFailureAction.FAIL_JOB: Consequence.JOB_FAILS,
    PodFailureAction.IGNORE: Consequence.NEW_POD,
    PodFailureAction.COUNT: Consequence.RETRY,
}


@dataclass(frozen=True)
class FailureClass:
    """Row of the table: what follows, and what a person can do about it."""

    exit_code: ExitCode | None
    """Code that the trainer exits with; None for reasons that only the operator gives, because no trainer could."""

    hint: str
    seen_by_operator: Consequence | None = None
    """Consequence where the operator gives the reason, because the trainer could not; None if it never does."""

    @property
    def after_exit(self) -> Consequence | None:
        """Consequence where the trainer gives the reason itself; None if it never does."""
        if self.exit_code in RESTARTED_ONCE:
            return Consequence.ONCE
        return None if self.exit_code is None else _CONSEQUENCES[action_after(self.exit_code)]


FAILURES: dict[FailureReason, FailureClass] = {
    FailureReason.INVALID_CONFIGURATION: FailureClass(
        ExitCode.CONFIGURATION, "Correct the named field and create the job again."
    ),
    FailureReason.UNSUPPORTED_ARCHITECTURE: FailureClass(
        ExitCode.CONFIGURATION, "Use a model of a supported family, or export without GGUF."
    ),
    FailureReason.UNSAFE_MODEL: FailureClass(
        ExitCode.CONFIGURATION, "Use a repository with safetensors weights and without custom code."
    ),
    FailureReason.CHAT_TEMPLATE_MISSING: FailureClass(
        ExitCode.CONFIGURATION,
        "Set spec.model.chatTemplateName or spec.model.chatTemplate, or use an instruction-tuned model.",
    ),
    FailureReason.INVALID_CHAT_TEMPLATE: FailureClass(
        ExitCode.CONFIGURATION, "Correct the Jinja template in spec.model.chatTemplate."
    ),
    FailureReason.INVALID_ROW: FailureClass(
        ExitCode.DATA, "Correct the named line, or set spec.dataset.onBadRow: Skip to leave such rows out."
    ),
    FailureReason.MISSING_COLUMN: FailureClass(
        ExitCode.DATA, "Name the dataset's own columns in spec.dataset.columns, or set spec.dataset.format."
    ),
    FailureReason.EMPTY_DATASET: FailureClass(
        ExitCode.DATA, "Point spec.dataset.source at a file with at least one usable row."
    ),
    FailureReason.NO_SUPERVISED_TOKENS: FailureClass(
        ExitCode.DATA,
        "Raise spec.model.maxSequenceLength, check that rows have assistant turns, or set spec.dataset.trainOn: All.",
    ),
    FailureReason.MODEL_NOT_FOUND: FailureClass(ExitCode.ACCESS, "Check spec.model.source and spec.model.revision."),
    FailureReason.MODEL_ACCESS_DENIED: FailureClass(
        ExitCode.ACCESS,
        "Accept the model's licence and name a Secret with HF_TOKEN (or S3 keys) in spec.model.credentials.",
    ),
    FailureReason.DATASET_NOT_FOUND: FailureClass(ExitCode.ACCESS, "Check spec.dataset.source."),
    FailureReason.DATASET_ACCESS_DENIED: FailureClass(
        ExitCode.ACCESS, "Name a Secret that may read the dataset in spec.dataset.credentials."
    ),
    FailureReason.OUT_OF_MEMORY: FailureClass(
        ExitCode.OUT_OF_MEMORY,
        "Raise spec.resources.memory and create the job again: it goes on from its last checkpoint.",
        Consequence.JOB_FAILS,
    ),
    FailureReason.CUDA_OUT_OF_MEMORY: FailureClass(
        ExitCode.OUT_OF_MEMORY, "Lower spec.training.batchSize or spec.model.maxSequenceLength, or use a larger GPU."
    ),
    FailureReason.DRIVER_TOO_OLD: FailureClass(
        ExitCode.CONFIGURATION,
        "Update NVIDIA's driver on the GPU nodes, or choose others: spec.resources.nodeSelector.",
    ),
    FailureReason.NON_FINITE_LOSS: FailureClass(
        ExitCode.DIVERGED, "Lower spec.training.learningRate, or set spec.training.precision: BF16."
    ),
    FailureReason.LOSS_DIVERGED: FailureClass(
        ExitCode.DIVERGED,
        "Lower spec.training.learningRate, raise spec.training.warmupSteps, or look at the rows of the named steps.",
    ),
    FailureReason.NOTHING_LEARNED: FailureClass(
        ExitCode.TRAINING,
        "Raise spec.training.learningRate (2e-4 is usual for LoRA), or train more steps: spec.training.epochs.",
    ),
    FailureReason.BUCKET_NOT_FOUND: FailureClass(
        ExitCode.STORAGE, "Create the bucket, or correct spec.output.s3.bucket."
    ),
    FailureReason.STORAGE_NOT_WRITABLE: FailureClass(
        ExitCode.STORAGE, "Give the credentials in spec.output.s3.credentials write access to the prefix."
    ),
    FailureReason.OUTPUT_EXISTS: FailureClass(
        ExitCode.STORAGE,
        "Choose another spec.output.s3.prefix, or onExisting: Overwrite for an older result of this job.",
    ),
    FailureReason.UPLOAD_CORRUPTED: FailureClass(
        ExitCode.UNAVAILABLE, "Check the object store: it returned other bytes than were uploaded."
    ),
    FailureReason.DISK_FULL: FailureClass(ExitCode.DISK_FULL, "Raise spec.resources.ephemeralStorage."),
    FailureReason.EXPORT_FAILED: FailureClass(
        ExitCode.EXPORT,
        "The trained adapter is published. Make what is missing by the command in the message, or correct spec.export "
        "and create the job again: it goes on from its last checkpoint.",
    ),
    FailureReason.HUB_UNAVAILABLE: FailureClass(
        ExitCode.UNAVAILABLE, "The Hugging Face Hub did not answer; the job is tried again."
    ),
    FailureReason.HUB_NOT_WRITABLE: FailureClass(
        ExitCode.STORAGE, "Check spec.output.hub: the Secret's HF_TOKEN must be allowed to write to the repository."
    ),
    FailureReason.STORAGE_UNAVAILABLE: FailureClass(
        ExitCode.UNAVAILABLE, "The object store did not answer; the job is tried again."
    ),
    FailureReason.ENDPOINT_NOT_ALLOWED: FailureClass(
        ExitCode.CONFIGURATION,
        "Create the job again with another spec.output.s3.endpointURL, or ask the administrator to allow this one.",
        Consequence.JOB_FAILS,
    ),
    FailureReason.ENDPOINT_REDIRECTED: FailureClass(
        ExitCode.CONFIGURATION,
        "Create the job again with the address that the message names in spec.output.s3.endpointURL, if you trust it.",
    ),
    FailureReason.CERTIFICATE_NOT_TRUSTED: FailureClass(
        ExitCode.ACCESS, "Name your authority's certificates in spec.pod.caBundle, or have the administrator do it."
    ),
    FailureReason.INTERRUPTED: FailureClass(
        ExitCode.INTERRUPTED, "The pod was stopped; training goes on from the last checkpoint."
    ),
    FailureReason.STALLED: FailureClass(
        ExitCode.STALLED,
        "See the stacks of all threads in the trainer's log; if the run was only slow, raise "
        "spec.runPolicy.stallTimeoutSeconds in a new job, which goes on from the last checkpoint.",
        Consequence.ONCE,
    ),
    FailureReason.COLLECTIVE_TIMEOUT: FailureClass(
        ExitCode.STALLED,
        "See the stacks of all processes in the trainer's log: one waits for the others. If they were only slow, raise "
        "spec.runPolicy.stallTimeoutSeconds in a new job of the same name.",
    ),
    FailureReason.NODE_UNREACHABLE: FailureClass(
        ExitCode.UNAVAILABLE,
        "Let the job's pods talk to each other on all ports: look for a NetworkPolicy or a firewall that forbids it.",
    ),
    FailureReason.INTERNAL_ERROR: FailureClass(
        ExitCode.INTERNAL, "This is a defect: see the trainer's log for the traceback."
    ),
    FailureReason.DEADLINE_EXCEEDED: FailureClass(
        None, "Raise spec.runPolicy.activeDeadlineSeconds.", Consequence.JOB_FAILS
    ),
    FailureReason.GPU_BUDGET_EXHAUSTED: FailureClass(
        None,
        "Raise spec.runPolicy.maxGpuSeconds in a new job of the same name, which goes on from the last checkpoint.",
        Consequence.JOB_FAILS,
    ),
    FailureReason.GPU_LIMIT_EXCEEDED: FailureClass(
        None,
        "Create the job again with fewer spec.resources.gpus, or ask the administrator to raise maxGpusPerNamespace.",
        Consequence.JOB_FAILS,
    ),
    FailureReason.STARTUP_DEADLINE_EXCEEDED: FailureClass(
        None,
        "Raise spec.runPolicy.startupDeadlineSeconds: the first start on a node also pulls the trainer image.",
        Consequence.JOB_FAILS,
    ),
    FailureReason.POD_FIELD_NOT_ALLOWED: FailureClass(
        None,
        "Create the job again without the fields named, or ask the administrator to allow them (allowedOverrides).",
        Consequence.JOB_FAILS,
    ),
    FailureReason.UNSCHEDULABLE: FailureClass(
        None, "Free or add a node that has what spec.resources asks for, or ask for less.", Consequence.QUEUES
    ),
    FailureReason.IMAGE_PULL_FAILED: FailureClass(
        None, "Check the trainer image that the operator was installed with.", Consequence.WAITS
    ),
    FailureReason.CONTAINER_CONFIG_ERROR: FailureClass(
        None, "Create the Secret or ConfigMap that the message names, in the job's namespace.", Consequence.WAITS
    ),
    FailureReason.POD_REJECTED: FailureClass(
        None, "Raise the namespace's quota, or change the admission policy that refused the pod.", Consequence.WAITS
    ),
    FailureReason.EVICTED: FailureClass(
        None, "The node evicted the pod; it is replaced and resumes from its checkpoint.", Consequence.NEW_POD
    ),
    FailureReason.TRAINER_CRASHED: FailureClass(
        None, "See the trainer's log: the process ended without writing a result.", Consequence.RETRY
    ),
    FailureReason.UNTRUSTED_RESULT: FailureClass(
        None,
        "Find out who changed the pod's status or the trainer image: a trainer's last word is short and names only "
        "files below status.resultLocation, where manifest.json lists the job's own result.",
        Consequence.JOB_FAILS,
    ),
}


def exit_code_of(reason: FailureReason) -> ExitCode:
    """Returns the code that the trainer exits with. Raises ValueError for a reason that only the operator gives."""
    exit_code = FAILURES[reason].exit_code
    if exit_code is None:
        raise ValueError(f"{reason} is a reason of the operator: the trainer has no exit code for it")
    return exit_code


def ends_the_job(reason: FailureReason) -> bool:
    """True if a trainer that ends with this reason of its own fails the job at once, so that nothing is tried again."""
    return FAILURES[reason].after_exit is Consequence.JOB_FAILS
