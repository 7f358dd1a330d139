"""Queue and scheduler of a job: Kueue, or another scheduler such as Volcano, Run:ai and KAI."""

from typing import Annotated

from pydantic import Field

from finetune_api.base import QUALIFIED_NAME, SUBDOMAIN, ApiModel, Pattern, ResourceName, Rule
from finetune_api.spec.run import LabelValue

OTHER_SCHEDULERS = r"((scheduling\.)?volcano\.sh|runai|run\.ai|kai\.scheduler)"
_TOPOLOGY = r"kueue\.x-k8s\.io/podset-(required|preferred|unconstrained)-topology"

QueueName = Annotated[
    str,
    Field(min_length=1, max_length=63),
    Pattern(
        rf"^{SUBDOMAIN}$",
        "write the name of a LocalQueue of the job's namespace, with at most 63 characters: it becomes a label",
    ),
]
SchedulerLabel = Annotated[
    str,
    Field(max_length=317),
    Pattern(
        rf"^({OTHER_SCHEDULERS}/{QUALIFIED_NAME}|kueue\.x-k8s\.io/max-exec-time-seconds)$",
        "write labels of volcano.sh, scheduling.volcano.sh, runai, run.ai or kai.scheduler, or "
        "kueue.x-k8s.io/max-exec-time-seconds; Kueue's queue and priority are queueName and workloadPriorityClassName",
    ),
]
SchedulerAnnotation = Annotated[
    str,
    Field(max_length=317),
    Pattern(
        rf"^(({OTHER_SCHEDULERS}|provreq\.kueue\.x-k8s\.io)/{QUALIFIED_NAME}|{_TOPOLOGY})$",
        "write annotations of volcano.sh, scheduling.volcano.sh, runai, run.ai, kai.scheduler or "
        "provreq.kueue.x-k8s.io, or a topology such as kueue.x-k8s.io/podset-required-topology",
    ),
]


class SchedulingSpec(ApiModel):
    """Queue and scheduler that decide when the trainer runs, and where."""

    queue_name: QueueName | None = None
    """LocalQueue of Kueue, in the job's namespace, that the trainer waits in. Kueue alone then starts and stops the
    trainer; one that it evicts goes on from its newest checkpoint. Default: no queue."""

    workload_priority_class_name: ResourceName | None = None
    """WorkloadPriorityClass of Kueue, which orders the queue and says who is preempted. Default: the priority of
    spec.resources.priorityClassName."""

    scheduler_name: ResourceName | None = None
    """Scheduler of the trainer's pod, such as volcano, runai-scheduler or kai-scheduler. Default: the cluster's."""

    labels: Annotated[dict[SchedulerLabel, LabelValue], Field(max_length=16, default_factory=dict)]
    """Labels of the trainer's Job and pod for a scheduler, such as kai.scheduler/queue and runai/queue."""

    annotations: Annotated[
        dict[SchedulerAnnotation, Annotated[str, Field(max_length=256)]], Field(max_length=16, default_factory=dict)
    ]
    """Annotations of the trainer's Job and pod for a scheduler, such as scheduling.volcano.sh/queue-name."""

    rules = (
        Rule(
            cel="!has(self.workloadPriorityClassName) || has(self.queueName)",
            holds=lambda spec: spec.workload_priority_class_name is None or spec.queue_name is not None,
            message="spec.scheduling.workloadPriorityClassName goes with a queue of Kueue: write "
            "spec.scheduling.queueName too, or use spec.resources.priorityClassName",
        ),
        Rule(
            cel="!has(self.workloadPriorityClassName) || size(self.workloadPriorityClassName) <= 63",
            holds=lambda spec: len(spec.workload_priority_class_name or "") <= 63,
            message="spec.scheduling.workloadPriorityClassName becomes a label: choose a name of at most 63 characters",
        ),
    )
