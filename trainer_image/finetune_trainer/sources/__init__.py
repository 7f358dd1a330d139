"""Models and datasets from the Hugging Face Hub, S3, mounted claims and local folders, downloaded to a local folder.

fetch         the entry: fetch_model, find_model_version, fetch_weight_headers, fetch_adapter, fetch_dataset
repository    what all kinds of source have in common, as a protocol
hub           hf:// repositories at one commit
s3            s3:// objects and prefixes
local         pvc:// and file:// paths, used in place
selection     the files of a source that are used; pickled weights and code never are
authorities   whose certificates a pod trusts: the public ones, and those of spec.pod.caBundle
dataset_card  subsets and splits that a dataset's README.md names
front_matter  the YAML block at the beginning of a README.md
"""

from finetune_trainer.sources.fetch import (
    FetchedSource,
    fetch_adapter,
    fetch_dataset,
    fetch_model,
    fetch_model_configuration,
    fetch_weight_headers,
    find_model_version,
)
from finetune_trainer.sources.repository import SourceAccess

__all__ = [
    "FetchedSource",
    "SourceAccess",
    "fetch_adapter",
    "fetch_dataset",
    "fetch_model",
    "fetch_model_configuration",
    "fetch_weight_headers",
    "find_model_version",
]
