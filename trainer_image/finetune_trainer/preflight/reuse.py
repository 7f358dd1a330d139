"""Finds a result that is there already, before anything else: a job that is created again then needs neither checks nor
a GPU. If all but the data could be the same, the data is read first."""

import logging
from functools import partial

from finetune_api.outcome import Outcome
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Stage
from finetune_trainer.artifacts.store import open_store
from finetune_trainer.errors import InterruptedRunError, TrainerError
from finetune_trainer.job.inputs import read_inputs
from finetune_trainer.job.outcome import published
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings

log = logging.getLogger(__name__)


def find_result(config: RunConfig, settings: Settings) -> Outcome | None:
    """The outcome of a job whose result is committed.

    None if there is no result, if the output cannot be read (the checks say why), and if the result has to be pushed to
    the Hub as well: the trainer's pod has the disk for that.
    """
    if config.output.hub is not None:
        return None

    store = open_store(config, settings.attempt_id, settings.credentials_of("output"), settings.output_folder)
    try:
        existing = store.find_existing(partial(read_inputs, config, settings))
        if existing is None:
            return None
        outcome = published(existing, store.manifest_uri(), ProgressTracker(), reused=True)
    except InterruptedRunError:
        raise
    except TrainerError as error:
        log.info("no result is reused: %s", error.message)
        return None
    finally:
        store.close()

    return outcome.model_copy(update={"stage": Stage.PREFLIGHT})
