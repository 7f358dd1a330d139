"""`finetune-trainer`: what runs in a job's pods.

    finetune-trainer run         one attempt of a job, on the pod's GPUs; on several nodes, this pod's part of it
    finetune-trainer preflight   the job's checks, on a CPU

The process ends with an exit code of the table that operator and trainer share (finetune_api/failures.py).
"""

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from finetune_api.failures import FailureReason, exit_code_of
from finetune_api.outcome import Outcome
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Stage
from finetune_trainer.distributed.cards import check_cards, see_one_card
from finetune_trainer.distributed.driver import check_capability, check_driver
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.energy import open_meter
from finetune_trainer.job.logging_setup import configure_logging, configure_pod_logging
from finetune_trainer.job.outcome import failed, followed, overdue, published, stalled, write_outcome
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.reporter import Reporter
from finetune_trainer.job.settings import Settings, load_config
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.job.triton_cache import seed_triton_cache
from finetune_trainer.job.watchdog import Stall, Watchdog
from finetune_trainer.sources.authorities import trust_authorities
from finetune_trainer.sources.hub import restrict_hub

log = logging.getLogger(__name__)


def main() -> None:
    """Console script."""
    if sys.argv[1:] not in (["run"], ["preflight"]):
        sys.exit("usage: finetune-trainer run|preflight")

    configure_logging()
    stop_signal = StopSignal()
    stop_signal.install()
    settings = Settings.from_environment()

    if sys.argv[1] == "preflight":
        from finetune_trainer.preflight.process_memory import block_torch_import

        block_torch_import()
        from finetune_trainer.cli.preflight import preflight_attempt

        stop_signal.exit(preflight_attempt(settings, stop_signal))

    stop_signal.exit(run_attempt(settings, stop_signal))


def run_attempt(settings: Settings, stop_signal: StopSignal) -> int:
    """Runs the mounted job and writes its outcome; returns the exit code."""
    assert settings.termination_log is not None
    progress, termination_log = ProgressTracker(), settings.termination_log
    stop_signal.guard(lambda _: write_outcome(overdue(progress), termination_log))

    try:
        config = load_config(settings)
        trust_authorities(settings.ca_bundle, settings.work)
    except TrainerError as error:
        return write_outcome(_failed(error, progress), termination_log)
    configure_pod_logging(config, settings.attempt_id)
    stop_signal.allow(config.termination_grace_period_seconds)
    if config.endpoints is not None:
        restrict_hub(config.endpoints)

    # Without an address and a token to report to, only the outcome tells how the run went.
    # On several nodes, the first pod alone reports, and watches over the whole run.
    leads = settings.node == 0
    reporter: Reporter | None = None
    if config.progress is not None and settings.token is not None and leads:
        heartbeat = config.stall.heartbeat_seconds if config.stall else None
        reporter = Reporter(progress, config.progress, settings.token, heartbeat)
        reporter.start()

    def end_stalled(stall: Stall) -> None:
        others = end_other_ranks()
        stop_signal.end_stalled(lambda: write_outcome(stalled(progress, stall, has_others=others), termination_log))

    def end(error: TrainerError) -> None:
        stop_signal.end_stalled(lambda: write_outcome(failed(error, progress), termination_log))

    limit = config.stall if leads else None
    watchdog = Watchdog(limit, end_stalled, is_watched=reporter is not None) if limit else None
    if watchdog is not None:
        watchdog.start()

    run = run_job if leads else follow_job
    outcome = run(config, settings, progress, stop_signal, end)
    stop_signal.conclude()
    if watchdog is not None:
        watchdog.close()
    code = write_outcome(outcome, termination_log)  # first of all: it is what counts
    if reporter is not None:
        reporter.close()
    return code


def end_other_ranks() -> bool:
    """Ends the other ranks of the run, with their stacks in the log; False if it has none, or has not begun."""
    other_ranks = sys.modules.get("finetune_trainer.distributed.other_ranks")  # which imports torch
    return other_ranks is not None and bool(other_ranks.OtherRanks.end_with_stacks())


def end_process(error: TrainerError) -> None:
    """Ends the process with the exit code of an error."""
    os._exit(exit_code_of(error.reason))


def run_job(
    config: RunConfig,
    settings: Settings,
    progress: ProgressTracker,
    stop_signal: StopSignal,
    end: Callable[[TrainerError], None] = end_process,
) -> Outcome:
    """Reuses a finished result, or trains and publishes one. Never raises: whatever happens, there is an outcome.

    `end` ends the process with the outcome of an error, if the main thread waits for a rank that has failed.
    """
    progress.measure_energy(open_meter(config.gpus))
    try:
        outcome = _run(config, settings, progress, stop_signal, end)
    except BaseException as error:  # noqa: BLE001 (signals and defects included)
        outcome = _failed(error, progress, settings.work)
    progress.finish()
    return outcome


def follow_job(
    config: RunConfig,
    settings: Settings,
    progress: ProgressTracker,
    stop_signal: StopSignal,
    end: Callable[[TrainerError], None] = end_process,
) -> Outcome:
    """Trains along in a pod of a run on several nodes that does not lead it. Never raises."""
    try:
        place = settings.place_among(config.nodes)
        if place is None:
            message = f"this pod is node {settings.node}, but its run has no other nodes to meet"
            raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
        _prepare_gpus(config, settings)
        from finetune_trainer.follower import follow
        from finetune_trainer.job.run_context import TrainingContext

        follow(TrainingContext(config, settings, progress, stop_signal), place, end)
        return followed(progress, place)
    except BaseException as error:  # noqa: BLE001 (signals and defects included)
        return _failed(error, progress, settings.work)


def _prepare_gpus(config: RunConfig, settings: Settings) -> None:
    if config.gpus:
        check_driver()
        check_capability()
        check_cards(config.gpus)
        see_one_card(0)
        seed_triton_cache(settings.triton_seed, settings.triton_cache)


def _failed(error: BaseException, progress: ProgressTracker, work: Path | None = None) -> Outcome:
    """Logs the error, with a traceback if it is a defect, and returns its outcome."""
    outcome = failed(error, progress, work)
    log.error("%s: %s", outcome.reason, outcome.message, exc_info=None if isinstance(error, TrainerError) else error)
    return outcome


def _run(
    config: RunConfig,
    settings: Settings,
    progress: ProgressTracker,
    stop_signal: StopSignal,
    end: Callable[[TrainerError], None],
) -> Outcome:
    from finetune_trainer.artifacts.hub_push import open_hub, push_result
    from finetune_trainer.artifacts.store import open_store
    from finetune_trainer.job.inputs import read_inputs
    from finetune_trainer.job.run_context import RunContext

    # Storage and hub first: a job that cannot publish should fail before it trains.
    store = open_store(config, settings.attempt_id, settings.credentials_of("output"), settings.output_folder)
    try:
        store.probe()

        hub = open_hub(config.output.hub, settings.credentials_of("hub"))
        if hub is not None:
            hub.prepare()

        if (existing := store.find_existing(partial(read_inputs, config, settings))) is not None:
            hub_url = push_result(hub, store.object_store, existing, settings.work / "artifacts")
            return published(existing, store.manifest_uri(), progress, reused=True, hub_url=hub_url)

        _prepare_gpus(config, settings)
        progress.stage(Stage.MODEL_LOADING)  # this includes importing torch: 3 s, on two busy cores 7 s
        from finetune_trainer.pipeline import run

        manifest = run(RunContext(config, settings, progress, stop_signal, store, end))
        hub_url = push_result(hub, store.object_store, manifest, settings.work / "artifacts")
        return published(manifest, store.manifest_uri(), progress, reused=False, hub_url=hub_url)
    finally:
        store.close()
