"""The identity of what a job trains on: its data is read for it, of the model no more than the list of its files."""

from finetune_api.run_config import RunConfig
from finetune_trainer.artifacts.existing import Inputs
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.source_access import access_source
from finetune_trainer.sources import fetch_dataset, find_model_version
from finetune_trainer.storage.object_store import ignore_bytes


def read_inputs(config: RunConfig, settings: Settings) -> Inputs:
    """Returns version and digests as a run of the job would find them now. Raises TrainerError."""
    model, dataset = config.model, config.dataset
    version = find_model_version(model.source, model.revision, access_source(config, settings, "model"))

    access, work = access_source(config, settings, "dataset"), settings.work / "inputs"
    data = fetch_dataset(dataset.source, dataset.split, work, access, ignore_bytes, dataset.subset)

    source, digest = dataset.evaluation_source(), None
    if source is not None:
        digest = fetch_dataset(*source, work, access, ignore_bytes, dataset.evaluation_subset()).digest
    return Inputs(version, data.digest, digest)
