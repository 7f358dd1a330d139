"""Access of a job to its model and its data: the same for preflight and for the run."""

from finetune_api.run_config import RunConfig
from finetune_trainer.job.settings import Settings
from finetune_trainer.sources import SourceAccess


def access_source(config: RunConfig, settings: Settings, use: str) -> SourceAccess:
    """Returns credentials, endpoint and mount for reading the `model` or the `dataset`."""
    s3 = config.output.s3
    mount = settings.model_mount if use == "model" else settings.dataset_mount
    return SourceAccess(
        settings.credentials_of(use),
        s3.endpoint_url,
        s3.region,
        config.endpoints,
        mount,
        hub_retries=settings.hub_retries,
        hub_cache=settings.hub_cache,
    )
