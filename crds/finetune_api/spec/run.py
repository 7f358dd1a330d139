"""Resources of a job, and the policy it runs under."""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import (
    MAX_SECONDS,
    QUALIFIED_NAME,
    SUBDOMAIN,
    ApiModel,
    ByteQuantity,
    CpuQuantity,
    Pattern,
    ResourceName,
    Rule,
)
from finetune_api.vocabulary import MultiNode, PreflightMode

LabelKey = Annotated[
    str,
    Field(max_length=317),
    Pattern(rf"^({SUBDOMAIN}/)?{QUALIFIED_NAME}$", "write a key such as zone or example.com/zone"),
]
LabelValue = Annotated[
    str,
    Field(max_length=63),
    Pattern(
        rf"^({QUALIFIED_NAME})?$",
        "write at most 63 letters, digits, '-', '_' and '.', with a letter or digit at the ends",
    ),
]
ExtendedResource = Annotated[
    str,
    Field(max_length=253),
    Pattern(rf"^{SUBDOMAIN}/{QUALIFIED_NAME}$", "write an extended resource such as nvidia.com/gpu"),
]


MAX_NODES = 64
"""Nodes of a run: their numbers have two digits at most, for which names of pods leave room."""

MAX_NAME_ON_NODES = 54
"""Characters of the name of a job on several nodes, so that its pods have host names of at most 63."""


class Toleration(ApiModel):
    """A taint that the trainer's pod accepts, as in a pod."""

    key: LabelKey | None = None
    """Key of the taint; leave it out with operator Exists to tolerate every taint."""

    operator: Literal["Equal", "Exists"] = "Equal"
    """Equal compares the value, Exists requires only the key. Default Equal."""

    value: LabelValue | None = None
    """Value of the taint, with operator Equal."""

    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. Default: every effect."""

    toleration_seconds: Annotated[int, Field(ge=0, le=MAX_SECONDS)] | None = None
    """Seconds for which a NoExecute taint is tolerated. Default: no limit."""

    rules = (
        Rule(
            cel="self.operator == 'Equal' ? has(self.key) : !has(self.value)",
            holds=lambda t: t.key is not None if t.operator == "Equal" else t.value is None,
            message="spec.resources.tolerations: operator Equal needs a key, and operator Exists takes no value",
        ),
        Rule(
            cel="!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            holds=lambda t: t.toleration_seconds is None or t.effect == "NoExecute",
            message="spec.resources.tolerations: tolerationSeconds only goes with effect NoExecute",
        ),
    )


class ResourcesSpec(ApiModel):
    """Resources and placement of the trainer's pod."""

    gpus: Annotated[int, Field(ge=0, le=16)] = 1
    """GPUs of each node: with more than 1, each trains on its share of every step, which is the same step, and as much
    faster. 0 trains on the CPU (tiny models only). Default 1."""

    nodes: Annotated[int, Field(ge=1, le=MAX_NODES)] = 1
    """Nodes that train together, each with `gpus` GPUs and a pod of its own; all other resources are those of one pod.
    The pods start together, and when one ends, all go on from the newest checkpoint. With more than 1, the job's name
    has at most 54 characters. Default 1."""

    multi_node: MultiNode = MultiNode.JOB
    """What makes the pods of several nodes: a Job of Kubernetes itself or, where the cluster has its controller and the
    administrator lets the operator make them, a JobSet. Both train the same. Default Job."""

    gpu_resource_name: ExtendedResource = "nvidia.com/gpu"
    """Extended resource that represents a GPU, such as nvidia.com/gpu or nvidia.com/mig-3g.40gb. Default
    nvidia.com/gpu."""

    gpu_memory: ByteQuantity | None = None
    """Memory of the GPU, in bytes with a unit such as Gi; preflight refuses a job that cannot fit into it. Default:
    read from the node selector's nvidia.com/gpu.product or nvidia.com/gpu.memory, or from a MIG resource's name; if
    none of them is set, preflight shows the memory needed and refuses nothing."""

    cpu: CpuQuantity = 4
    """CPU cores requested, such as 4 or 500m. Default 4. There is no CPU limit."""

    memory: ByteQuantity = "32Gi"
    """Host memory, request and limit alike, in bytes with a unit such as Gi. Default 32Gi."""

    ephemeral_storage: ByteQuantity | None = None
    """Disk for the base model, checkpoints and artifacts, in bytes with a unit such as Gi. Plan about 2 bytes per
    parameter for each of: base, merged weights, F16 or BF16 GGUF. Default: no request."""

    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=32, default_factory=dict)]
    """Labels that the node must have."""

    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=32)] = ()
    """Taints that the pod accepts."""

    runtime_class_name: ResourceName | None = None
    """RuntimeClass of the pod, such as nvidia. Default: the cluster's."""

    priority_class_name: ResourceName | None = None
    """PriorityClass of the pod. Default: the cluster's."""

    @property
    def processes(self) -> int:
        """Processes that train together: one a GPU, or one a node without GPUs."""
        return max(1, self.gpus) * self.nodes

    @property
    def all_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.gpus * self.nodes

    rules = (
        Rule(
            cel="!self.gpuResourceName.startsWith('requests.')",
            holds=lambda spec: not spec.gpu_resource_name.startswith("requests."),
            message="spec.resources.gpuResourceName: write the resource as the node offers it, without 'requests.'",
        ),
        Rule(
            cel="!has(self.gpuMemory) || self.gpus > 0",
            holds=lambda spec: spec.gpu_memory is None or spec.gpus > 0,
            message="spec.resources.gpuMemory goes with a GPU: remove it, or write gpus: 1",
        ),
        Rule(
            cel="self.multiNode != 'JobSet' || self.nodes > 1",
            holds=lambda spec: spec.multi_node is not MultiNode.JOB_SET or spec.nodes > 1,
            message="spec.resources.multiNode: JobSet is for several nodes: write nodes: 2 or more, or multiNode: Job",
        ),
    )


class RunPolicySpec(ApiModel):
    """Retries, deadline, suspension and clean-up."""

    suspend: bool = False
    """Stop the trainer, which writes a checkpoint, and hold the job; false resumes it from there. May be changed at any
    time. Default false."""

    preflight: PreflightMode = PreflightMode.RUN
    """Run first checks the model, every row of the data and the output in a small pod without a GPU, and ends the job
    if something is wrong; Skip leaves these checks out, and the trainer finds the same errors later. Default Run."""

    max_retries: Annotated[int, Field(ge=0, le=20)] = 3
    """Number of retries after a temporary failure (a lost connection, a crash). Pods that the cluster evicts do not
    count. Default 3."""

    active_deadline_seconds: Annotated[int, Field(ge=1, le=MAX_SECONDS)] | None = None
    """Maximum seconds that the job may run, including time spent waiting for a node and excluding time in suspension.
    May be changed at any time. Default: no limit."""

    max_gpu_seconds: Annotated[int, Field(ge=1, le=MAX_SECONDS)] | None = None
    """Maximum GPU-seconds of the job: seconds that its pods hold a node, with all retries, times the number of GPUs.
    The job then fails, and keeps its newest checkpoint. Preflight refuses a job whose estimate is larger. May be
    changed at any time. Default: no limit."""

    startup_deadline_seconds: Annotated[int, Field(ge=1, le=MAX_SECONDS)] | None = None
    """Maximum seconds that a pod may take to start, each time that one is wanted: for a place in the quota, for a node,
    for its image and its volumes. The job then fails with the reason of the wait. Time in suspension does not count.
    May be changed at any time. Default: no limit, but 3600 s for a pod that has a node and waits for a person, as for
    an image or a Secret that does not exist."""

    stall_timeout_seconds: Annotated[int, Field(ge=10, le=MAX_SECONDS)] | None = None
    """Seconds after which a trainer that does nothing counts as stalled: no step, no row, no byte of a download or an
    upload. It then writes the stacks of all its threads into its log, and another pod goes on from the last checkpoint,
    once; the second time the job fails. Default 1800, or three times the longest pause that the run has come through
    if that is more, at most 4 hours."""

    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=MAX_SECONDS)] | None = None
    """Seconds after which the pods of a finished job are removed; the FineTuneJob and the artifacts stay. May be
    changed at any time. Default: the pods stay as well."""

    termination_grace_period_seconds: Annotated[int, Field(ge=5, le=3600)] = 120
    """Seconds that a stopped trainer gets to write its checkpoint. Default 120."""

    checkpoints_to_keep: Annotated[int, Field(ge=1, le=100)] = 2
    """Number of checkpoints to keep in S3 while the job runs; older ones are deleted. Default 2."""

    keep_checkpoints_after_success: bool = False
    """Keep the checkpoints of a job that has succeeded; false deletes them, as nothing goes on from them. Default
    false."""
