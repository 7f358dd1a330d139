"""Where models and datasets come from: `fetch_model` and `fetch_dataset` bring them to a local folder."""

from finetune_trainer.sources.fetch import (
    FetchedSource,
    fetch_adapter,
    fetch_dataset,
    fetch_model,
    fetch_model_configuration,
)
from finetune_trainer.sources.repository import SourceAccess

__all__ = [
    "FetchedSource",
    "SourceAccess",
    "fetch_adapter",
    "fetch_dataset",
    "fetch_model",
    "fetch_model_configuration",
]
