"""The sources of a run: base model, dataset and evaluation data, as every pod of it fetches them."""

from finetune_trainer.distributed.nodes.same_rows import Inputs
from finetune_trainer.job.run_context import TrainingContext
from finetune_trainer.job.source_access import access_source
from finetune_trainer.sources import FetchedSource, fetch_dataset, fetch_model
from finetune_trainer.stages.data_formatting import FormattedData
from finetune_trainer.storage.object_store import ignore_bytes


def fetch_base(context: TrainingContext) -> FetchedSource:
    """Fetches the base model into the work folder."""
    spec = context.config.model
    access = access_source(context.config, context.settings, "model")
    return fetch_model(spec.source, spec.revision, context.settings.work / "base", access, ignore_bytes)


def fetch_rows(context: TrainingContext) -> FetchedSource:
    """Fetches the files to train on into the work folder."""
    spec = context.config.dataset
    access = access_source(context.config, context.settings, "dataset")
    return fetch_dataset(spec.source, spec.split, context.settings.work / "data", access, ignore_bytes, spec.subset)


def fetch_evaluation(context: TrainingContext) -> FetchedSource | None:
    """Fetches the files of the job's evaluation source; None if it names none."""
    source = context.config.dataset.evaluation_source()
    if source is None:
        return None

    access = access_source(context.config, context.settings, "dataset")
    subset = context.config.dataset.evaluation_subset()
    return fetch_dataset(*source, context.settings.work / "evaluation", access, ignore_bytes, subset)


def describe_inputs(
    base: FetchedSource, source: FetchedSource, evaluation: FetchedSource | None, data: FormattedData
) -> Inputs:
    """Returns what tells a pod's inputs from others, for `share_rows`."""
    return {
        "model": base.digest,
        "dataset": source.digest,
        "evaluation data": evaluation.digest if evaluation else None,
        "rows": len(data.train),
        "supervised tokens": data.supervised_tokens,
    }
