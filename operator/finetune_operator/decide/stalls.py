"""Rules about runs that stall or diverge: one restart from the last good checkpoint, then the end (pure).

The Job controller makes the next pod, for exit codes 31 and 32 and for a pod that was evicted, and counts none of them.
So it is the operator that ends the job the second time, as for a startup deadline: the status first, then the Job.
"""

from dataclasses import replace
from datetime import timedelta

from finetune_api.failures import RESTARTED_ONCE, ExitCode, FailureReason
from finetune_operator.decide.decision import RETRY_SECONDS, Decision, Eviction
from finetune_operator.decide.explain_failure import build_failure, explain_pod
from finetune_operator.decide.shared import run_is_open
from finetune_operator.decide.silence import Silence, find_silence, is_given_up
from finetune_operator.desired.installation import Installation
from finetune_operator.desired.run_config_map import reports_elsewhere
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.several_pods import end_of_attempt, find_survivors
from finetune_operator.observe.snapshot import ChildRun, Snapshot
from finetune_operator.status_reasons import StatusReason

NODE_END_SECONDS = 60.0
"""Time after the end of an attempt in which its pods on further nodes end: they do so within 30 s, if they can."""

_NODE_HANGS = (
    ". If this takes longer than its grace period, its node hangs: once the node is off for good, delete it "
    "(kubectl delete node), and the pod ends with it"
)


def restart_is_used_up(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """The newest pod stalled or diverged, and so did one before it: a third would end the same way."""
    pod = run.newest_pod
    if pod is None or not pod.is_finished:
        return None
    kind = _kind(snapshot, pod)
    former = _former(snapshot, run, kind) if kind is not None else None
    if former is None:
        return None

    reason, message = explain_pod(snapshot, run, pod)
    failure = build_failure(snapshot, run, reason, f"{message}; it happened before, in pod {former}")
    return Decision.fail(failure, outcome=run.outcome, requeue_seconds=0)


def node_outlives_its_attempt(snapshot: Snapshot, run: ChildRun, installation: Installation) -> Decision | None:
    """A pod of a further node still runs, although the attempt that it was part of is over: the pods of the next one
    would wait for its place for ever. It is evicted, which the Job controller does not count."""
    ended, survivors = end_of_attempt(run.pods), find_survivors(run.pods, run.others)
    if ended is None or not survivors or snapshot.spec.run_policy.suspend:
        return None

    pod, open_run = survivors[0], run_is_open(snapshot, run, installation)
    wait = NODE_END_SECONDS - (snapshot.now - ended).total_seconds()
    if wait > 0:
        return replace(open_run, requeue_seconds=min(wait, open_run.requeue_seconds or wait))

    message = f"pod {pod.name} (node {pod.index}) did not end with its attempt: its process or its node hangs"
    if pod.deleting:
        message += f", and it is being stopped{_NODE_HANGS}"
        return replace(open_run, reason=FailureReason.STALLED, message=message, requeue_seconds=RETRY_SECONDS)

    message += ", so it is evicted, and another one takes its place"
    actions = replace(open_run.actions, evict_pod=Eviction(pod.name, pod.uid))
    return replace(
        open_run, reason=FailureReason.STALLED, message=message, actions=actions, requeue_seconds=RETRY_SECONDS
    )


def trainer_is_silent(snapshot: Snapshot, run: ChildRun, installation: Installation) -> Decision | None:
    """The trainer has reported before and does so no more. First the status says it; after a further time, the pod is
    evicted, which the Job controller does not count."""
    pod = run.newest_pod
    if pod is None or not pod.is_running or snapshot.spec.run_policy.suspend:
        return None
    if is_given_up(snapshot, pod.uid):
        return _evict(snapshot, run, pod, installation)

    # Nor can it report if its Job was made for another address or certificate.
    mounted = snapshot.config_map
    if mounted is not None and reports_elsewhere(mounted, snapshot.metadata, installation):
        return None

    silence = find_silence(snapshot, run)
    if silence is None or silence.seconds_until(silence.limit.silence, snapshot.now) > 0:
        return None

    left = silence.seconds_until(silence.limit.silence + silence.limit.patience, snapshot.now)
    if left > 0 or silence.is_shared:
        return _say_so(run_is_open(snapshot, run, installation), snapshot, silence, left)

    message = f"{_describe(snapshot, silence)}: its process or its node hangs"
    former = _former(snapshot, run, ExitCode.STALLED)
    if former is not None:
        failure = build_failure(snapshot, run, FailureReason.STALLED, f"{message}; a pod stalled before, {former}")
        return Decision.fail(failure, outcome=run.outcome, requeue_seconds=0)

    message += f", so pod {pod.name} is evicted, and another one goes on from the last checkpoint"
    open_run = run_is_open(snapshot, run, installation)
    return replace(open_run, reason=FailureReason.STALLED, message=message, given_up_pod=pod.uid, requeue_seconds=0)


def _say_so(open_run: Decision, snapshot: Snapshot, silence: Silence, left: float) -> Decision:
    message = _describe(snapshot, silence)
    if silence.is_shared:
        message += (
            ", and other trainers fell silent at the same time: nothing is ended for it. Check that pods reach the "
            "operator's progress server"
        )
    else:
        end = (snapshot.now + timedelta(seconds=left)).strftime("%H:%M:%S UTC")
        message += f": its process or its node may hang. Unless it reports, its pod is evicted at {end}"
    wait = left if left > 0 else RETRY_SECONDS
    return replace(open_run, reason=StatusReason.NOT_REPORTING, message=message, requeue_seconds=wait)


def _evict(snapshot: Snapshot, run: ChildRun, pod: TrainerPod, installation: Installation) -> Decision:
    """Evicts a pod that the status has given up, and waits for its end: there are never two trainers at once."""
    open_run = run_is_open(snapshot, run, installation)
    message = (
        f"pod {pod.name} did not report for long and is being stopped; another one goes on from the last checkpoint"
    )
    if pod.deleting:
        message += _NODE_HANGS

    actions = open_run.actions if pod.deleting else replace(open_run.actions, evict_pod=Eviction(pod.name, pod.uid))
    return replace(
        open_run, reason=FailureReason.STALLED, message=message, actions=actions, requeue_seconds=RETRY_SECONDS
    )


def _describe(snapshot: Snapshot, silence: Silence) -> str:
    # The message must not change with every look, so it names times instead of durations.
    heard = silence.last_report.strftime("%H:%M:%S UTC")
    return f"the trainer has not reported since {heard}, although it does so at least once a minute"


def _kind(snapshot: Snapshot, pod: TrainerPod) -> ExitCode | None:
    """Returns the exit code that says why a pod is restarted once; None for other ends."""
    if is_given_up(snapshot, pod.uid):
        return ExitCode.STALLED
    code = pod.termination.exit_code if pod.termination else None
    return next((each for each in RESTARTED_ONCE if each == code), None)


def _former(snapshot: Snapshot, run: ChildRun, kind: ExitCode) -> str | None:
    """Returns the name of an older pod that ended in the same way."""
    newest = run.newest_pod.uid if run.newest_pod else ""
    names = [pod.name for pod in run.pods if pod.uid != newest and _kind(snapshot, pod) is kind]
    for attempt in snapshot.status.attempts:
        is_stalled = attempt.reason == FailureReason.STALLED and kind is ExitCode.STALLED
        if attempt.uid != newest and (attempt.exit_code == kind or is_stalled):
            names.append(attempt.pod)
    return names[0] if names else None
