"""Where models and datasets come from: `fetch_model` and `fetch_dataset` bring them to a local folder."""

from finetune_trainer.sources.fetch import FetchedSource, SourceAccess, fetch_dataset, fetch_model

__all__ = ["FetchedSource", "SourceAccess", "fetch_dataset", "fetch_model"]
