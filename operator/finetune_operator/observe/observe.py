"""Reads everything that the decision about one job needs: live, never from a cache.

There are two exceptions. A pod that suspension or deletion stops vanishes as soon as it has ended, often before it can
be read. The watch keeps it in `TerminatedPods`, because its termination message names the newest checkpoint. And a job
of which only a progress report is new is not read again: `observe_reports`.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_api.base import Json
from finetune_api.cost.prices import Price
from finetune_api.explain import explain_errors
from finetune_api.job import FineTuneJob, ObjectMeta
from finetune_api.spec.location import LocationTemplate, location_uri
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.status import Attempt, FineTuneJobStatus, PreflightStatus
from finetune_api.vocabulary import JOB_UID_LABEL, Phase, PreflightResult
from finetune_operator.cluster.cluster import Cluster, NamespacedName
from finetune_operator.desired.installation import Installation
from finetune_operator.desired.names import PREFLIGHT, TRAINER, child_name, job_set_name, peers_name, preflight_name
from finetune_operator.desired.pod_plan import is_in_job_set, trainer_job_name
from finetune_operator.desired.run_config_map import build_run_config_map
from finetune_operator.errors import ForbiddenError
from finetune_operator.observe.blockers import find_blocker
from finetune_operator.observe.children import ChildJob, TrainerPod
from finetune_operator.observe.doubts import find_doubt
from finetune_operator.observe.gpu_use import read_gpu_use
from finetune_operator.observe.job_set import JobSet, find_problem, read_job_set, read_job_sets, take_from_set
from finetune_operator.observe.leftovers import find_orphaned_pods, find_predecessor
from finetune_operator.observe.queue import read_queue
from finetune_operator.observe.report_store import ReceivedReport, ReportStore
from finetune_operator.observe.several_pods import explain_ends, newest_others
from finetune_operator.observe.snapshot import (
    AnySnapshot,
    BlindSnapshot,
    ChildRun,
    Peers,
    Snapshot,
    UnreadableSnapshot,
    awaits_preflight,
    is_settled,
)
from finetune_operator.observe.terminated_pods import TerminatedPods


async def observe(
    cluster: Cluster,
    key: NamespacedName,
    terminated_pods: TerminatedPods,
    reports: ReportStore,
    installation: Installation,
) -> Snapshot | UnreadableSnapshot | BlindSnapshot | None:
    """Reads a job and its children; None if the job does not exist. `installation`: what a new Job would get.

    Raises ForbiddenError if the operator may not read FineTuneJobs.
    """
    body = await cluster.get_fine_tune_job(key)
    if body is None:
        return None

    metadata = ObjectMeta.model_validate(body["metadata"])
    status = read_status(body.get("status") or {})
    spec = _read_spec(body)

    seen = AnySnapshot(
        metadata=metadata,
        status=status,
        result_location=status.result_location or _locate(metadata, spec, installation.location_template),
        price=_price(spec, installation),
        now=cluster.now(),
    )
    try:
        seen = await _observe_children(cluster, seen, spec, terminated_pods, reports, installation)
        seen = replace(seen, job_set_problem=await _job_set_problem(cluster, seen, spec, installation))
        seen = replace(seen, queue=await read_queue(cluster.queues, seen, spec, installation))
        seen = replace(seen, gpu_use=await read_gpu_use(cluster, seen, spec, installation))
        seen = replace(seen, config_map=await _config_map(cluster, seen, spec, installation))
        seen = replace(seen, peers=await _peers(cluster, seen, spec))
    except ForbiddenError as error:
        return BlindSnapshot(**vars(seen), refusal=f"the API server refused {error.request}: {error.message}")
    return seen.with_spec(spec)


def observe_reports(seen: Snapshot, reports: ReportStore, now: datetime) -> Snapshot:
    """Returns a snapshot in which nothing has changed but the reports."""
    report = of_newest_pod(reports.show(seen.metadata.uid), seen.training.pods)
    training = replace(seen.training, report=report)
    return replace(seen, training=training, channel=reports.channel(seen.metadata.uid), now=now)


async def _observe_children(
    cluster: Cluster,
    job: AnySnapshot,
    spec: FineTuneJobSpec | str,
    terminated_pods: TerminatedPods,
    reports: ReportStore,
    installation: Installation,
) -> AnySnapshot:
    """Adds what belongs to a job: its two runs, and what is left over of others."""
    metadata, status = job.metadata, job.status
    key = NamespacedName(metadata.namespace, metadata.name)
    is_over = status.phase is not None and status.phase.is_terminal

    job_set = None
    if not is_settled(metadata, spec, status) and installation.job_sets and _is_in_set(spec):
        job_set = await read_job_set(cluster.job_sets, metadata.namespace, job_set_name(metadata))
    training_job = None if is_settled(metadata, spec, status) else await _trainer_job(cluster, job, spec, job_set)
    preflight_job = None  # one request less for every look at a job that trains
    if isinstance(spec, FineTuneJobSpec) and _needs_preflight_job(spec, status, training_job):
        preflight_job = await _job(cluster, key, preflight_name(metadata))

    # The status of a job that is over never changes again, so its pods do not matter.
    # Jobs are listed before pods: one that is gone by then has made its last pod.
    former_jobs = [] if is_over or training_job is not None else await cluster.list_jobs(key)
    former_sets = await read_job_sets(cluster.job_sets, key.namespace, former_jobs) if installation.job_sets else []
    listed = [] if is_over else await cluster.list_pods(key)
    live = [TrainerPod.parse(pod) for pod in listed if _job_uid(pod) == metadata.uid]
    # Live pods come last, so that of two readings of one pod the newer counts.
    known = [*terminated_pods.of(key.namespace, metadata.uid), *live]

    checked = status.preflight.attempts if status.preflight else ()
    preflight = ChildRun(PREFLIGHT, preflight_job, _pods_of(preflight_job, known, checked))
    every = _pods_of(training_job, known, status.attempts)
    others = tuple(pod for pod in every if pod.index)
    pods = explain_ends([pod for pod in every if not pod.index], others)
    report = of_newest_pod(reports.show(metadata.uid), pods)
    waited_for = newest_others(pods[-1] if pods else None, others)
    training = ChildRun(TRAINER, training_job, pods, report, others=waited_for, job_set=job_set)
    owned = {pod.uid for pod in (*every, *preflight.pods)}

    return replace(
        job,
        preflight=_with_doubt(preflight, job.result_location, metadata, status),
        training=_with_doubt(training, job.result_location, metadata, status),
        orphaned_pods=find_orphaned_pods(metadata, status.attempts, (pod for pod in live if pod.uid not in owned)),
        predecessor=find_predecessor(metadata, former_jobs, listed, former_sets) if training_job is None else None,
        channel=reports.channel(metadata.uid),
        blocker=None if is_over else await find_blocker(cluster, key, training if training.job else preflight),
        now=cluster.now(),
    )


def _price(spec: FineTuneJobSpec | str, installation: Installation) -> Price | None:
    if isinstance(spec, str) or installation.prices is None or spec.resources.gpus == 0:
        return None
    return installation.prices.find(spec.resources)


def of_newest_pod(report: ReceivedReport | None, pods: tuple[TrainerPod, ...]) -> ReceivedReport | None:
    """Returns a report of the newest pod; None if a job has a newer pod than the one that sent it."""
    return None if report and pods and report.pod_uid != pods[-1].uid else report


async def _config_map(
    cluster: Cluster, seen: AnySnapshot, spec: FineTuneJobSpec | str, installation: Installation
) -> Json | None:
    """Reads the ConfigMap that the current run's Job mounts; without a Job, the one that it would mount."""
    if seen.status.phase is not None and seen.status.phase.is_terminal:
        return None

    job, full = seen.current_run.job, seen.with_spec(spec)
    if job is not None:
        name = job.config_map_name
    elif isinstance(full, Snapshot):
        name = build_run_config_map(full.metadata, full.spec, full.output_prefix, installation)["metadata"]["name"]
    else:
        return None
    return await cluster.get_config_map(seen.metadata.namespace, name) if name else None


async def _peers(cluster: Cluster, seen: AnySnapshot, spec: FineTuneJobSpec | str) -> Peers:
    """Reads what lets the pods of several nodes find each other; nothing for a job on one node, or one that is over."""
    is_over = seen.status.phase is not None and seen.status.phase.is_terminal
    if isinstance(spec, str) or spec.resources.nodes == 1 or is_over:
        return Peers()
    namespace, name = seen.metadata.namespace, peers_name(seen.metadata)
    return Peers(
        await cluster.peers.get_service(namespace, name), await cluster.peers.get_network_policy(namespace, name)
    )


def read_status(raw: Json) -> FineTuneJobStatus:
    """Reads the status that the operator wrote last.

    Another version of the operator may have written fields that this one does not know. Then only what must never be
    forgotten is taken, and everything else is derived again.
    """
    try:
        return FineTuneJobStatus.model_validate(raw)
    except ValidationError:
        phase, seconds, location = raw.get("phase"), raw.get("activeSeconds"), raw.get("resultLocation")

        preflight = raw.get("preflight")
        result = preflight.get("result") if isinstance(preflight, dict) else None

        return FineTuneJobStatus(
            phase=Phase(phase) if phase in tuple(Phase) else None,
            active_seconds=seconds if isinstance(seconds, int) else None,
            result_location=location if isinstance(location, str) else None,
            preflight=PreflightStatus(result=result) if result in tuple(PreflightResult) else None,
        )


def _with_doubt(run: ChildRun, location: str | None, metadata: ObjectMeta, status: FineTuneJobStatus) -> ChildRun:
    """Adds why the newest pod's last word is not believed."""
    if location is None or run.outcome is None:
        return run

    # A pod may report the result of an earlier one, which committed first.
    pods = {pod.uid for pod in run.pods} | {attempt.uid for attempt in status.attempts}
    return replace(run, doubt=find_doubt(run.outcome, location, metadata.uid, pods))


def _locate(metadata: ObjectMeta, spec: FineTuneJobSpec | str, template: LocationTemplate) -> str | None:
    """Returns the result location of a job whose status has none yet; None if its spec cannot be read."""
    if isinstance(spec, str) or spec.output.s3.bucket is None:
        return None

    identity = metadata.model_dump(include={"namespace", "name", "uid"})
    return location_uri(spec.output.s3.bucket, template.resolve(spec.output.s3.prefix, **identity))


def _needs_preflight_job(spec: FineTuneJobSpec, status: FineTuneJobStatus, training_job: ChildJob | None) -> bool:
    """True if the Job of preflight matters: preflight is due or runs, or its Job has yet to be ended or to get its
    TTL."""
    if status.phase is None or not status.phase.is_terminal:
        return training_job is None and awaits_preflight(spec, status)
    if status.preflight is None:
        return False
    return status.preflight.result is PreflightResult.FAILED or spec.run_policy.ttl_seconds_after_finished is not None


def _job_uid(pod: Json) -> str:
    return str((pod["metadata"].get("labels") or {}).get(JOB_UID_LABEL, ""))


async def _trainer_job(
    cluster: Cluster, seen: AnySnapshot, spec: FineTuneJobSpec | str, job_set: JobSet | None
) -> ChildJob | None:
    metadata = seen.metadata
    key = NamespacedName(metadata.namespace, metadata.name)
    name = child_name(metadata) if isinstance(spec, str) else trainer_job_name(metadata, spec)
    job = await _job(cluster, key, name)
    if job is None or not _is_in_set(spec):
        return job
    return take_from_set(job, job_set, job_set_name(metadata), seen.status.active_seconds or 0, seen.now)


async def _job_set_problem(
    cluster: Cluster, seen: AnySnapshot, spec: FineTuneJobSpec | str, installation: Installation
) -> str | None:
    is_over = seen.status.phase is not None and seen.status.phase.is_terminal
    if not _is_in_set(spec) or is_over or seen.training.job_set is not None:
        return None
    return await find_problem(cluster.job_sets, installation.job_sets)


def _is_in_set(spec: FineTuneJobSpec | str) -> bool:
    return isinstance(spec, FineTuneJobSpec) and is_in_job_set(spec)


async def _job(cluster: Cluster, key: NamespacedName, name: str) -> ChildJob | None:
    body = await cluster.get_job(key.namespace, name)
    return ChildJob.parse(body) if body else None


def _read_spec(body: dict[str, Any]) -> FineTuneJobSpec | str:
    """Reads the spec; returns the fields in error, in words, if this version cannot."""
    # The status is read apart: an unknown field in it must not make the spec unreadable.
    document = body | {"status": {}}
    try:
        return FineTuneJob.from_object(document).spec
    except ValidationError as error:
        return "; ".join(map(str, explain_errors(error, document)))


def _pods_of(
    job: ChildJob | None, candidates: list[TrainerPod], seen: Sequence[Attempt] = ()
) -> tuple[TrainerPod, ...]:
    """Pods of a Job, oldest first. If a pod was read twice, the later reading counts.

    Kubernetes' times are whole seconds, and a pod that is refused or stopped at once is followed by another in the same
    one. Of these, the one that was seen before is older; of two that are new, the one that has ended, as a Job has one
    pod at a time.
    """
    by_uid = {pod.uid: pod for pod in candidates if job is not None and pod.owner_uid == job.uid}
    known = {attempt.uid: number for number, attempt in enumerate(seen)}

    def age(pod: TrainerPod) -> tuple[object, ...]:
        return pod.created, known.get(pod.uid, len(known)), not pod.is_finished, pod.name

    return tuple(sorted(by_uid.values(), key=age))
