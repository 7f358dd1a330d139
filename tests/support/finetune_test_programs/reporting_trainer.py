"""`finetune-trainer run` that trains nothing: it reports steps and losses to the operator as a trainer does.

For pictures and for many jobs at once. The job's name gives length and curve, so a run can be repeated; a job whose
name ends in `-bad-row` fails after a while. It never publishes, so it does not end by itself otherwise.
"""

import hashlib
import math
import random
import sys
import time
from datetime import UTC, datetime

from finetune_api.failures import FailureReason
from finetune_api.vocabulary import Stage
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.outcome import failed, write_outcome
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.reporter import Reporter
from finetune_trainer.job.settings import Settings, load_config

STEP_SECONDS = 0.25
QUIET_STAGES = (Stage.MODEL_LOADING, Stage.ADAPTER_INJECTION, Stage.DATA_FORMATTING, Stage.TRAINING_CONFIGURATION)


def run() -> int:
    """Report until the job's steps are over, then stay in the stage that exports; returns the exit code."""
    settings, progress = Settings.from_environment(), ProgressTracker()
    config = load_config(settings)
    assert config.progress is not None
    assert settings.token is not None
    assert settings.termination_log is not None

    name = config.job.name
    chance = random.Random(int(hashlib.sha256(name.encode()).hexdigest(), 16))
    reporter = Reporter(progress, config.progress, settings.token, heartbeat=10)
    reporter.start()
    for stage in QUIET_STAGES:
        progress.stage(stage)
        time.sleep(0.2)

    if name.endswith("-bad-row"):
        error = TrainerError(FailureReason.INVALID_ROW, "chat.jsonl:417: messages is not a list")
        code = write_outcome(failed(error, progress), settings.termination_log)
        reporter.close()
        return int(code)

    progress.stage(Stage.TRAINING)
    total, rate = chance.randrange(500, 1400), chance.uniform(60, 300)  # steps in all, and for two thirds of the way
    for step in range(1, total + 1):
        loss = 1.1 + 1.9 * math.exp(-step / rate) + chance.gauss(0, 0.04)
        left = int((total - step) * 9)
        progress.update(step=step, total_steps=total, loss=round(loss, 4), tokens_per_second=15_000, eta_seconds=left)
        time.sleep(STEP_SECONDS)

    progress.stage(Stage.SAVING)
    print(f"at {datetime.now(UTC):%H:%M:%S} all steps are reported", flush=True)
    time.sleep(600)
    return 0


if __name__ == "__main__":
    sys.exit(run())
