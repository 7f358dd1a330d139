"""Objects of a bucket: one key, or everything below a prefix that ends in a slash."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.failures import FailureReason
from finetune_api.sources import Source
from finetune_trainer.artifacts.s3_download import S3Downloader
from finetune_trainer.artifacts.s3_faults import DATASET_REASONS, MODEL_REASONS
from finetune_trainer.artifacts.s3_session import S3Location, S3Session
from finetune_trainer.artifacts.s3_space import S3Space
from finetune_trainer.artifacts.s3_upload import PARALLEL_PARTS
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    from finetune_trainer.sources.fetch import OnBytes, SourceAccess


def fetch_from_s3(
    source: Source, folder: Path, patterns: tuple[str, ...], access: SourceAccess, on_bytes: OnBytes, *, is_model: bool
) -> None:
    """Download the objects that match a pattern into `folder`. Raises TrainerError."""
    reasons = MODEL_REASONS if is_model else DATASET_REASONS
    location = S3Location(access.endpoint_url, access.region)
    session = S3Session(source.location, location, access.credentials, reasons, anonymous_allowed=True)
    prefix, _, last = source.path.rpartition("/")
    if is_model and last:
        prefix, last = source.path, ""  # a model is a folder, with or without the slash
    with ThreadPoolExecutor(PARALLEL_PARTS, "s3") as parts:
        keys = [last] if last else _matching_keys(session, prefix, patterns, parts)
        if not keys:
            reason = FailureReason.MODEL_NOT_FOUND if is_model else FailureReason.DATASET_NOT_FOUND
            names = ", ".join(patterns)
            raise TrainerError(reason, f"s3://{source.location}/{source.path} holds nothing that matches {names}")
        downloader = S3Downloader(session, parts)
        for key in keys:
            downloader.download(f"{prefix}/{key}" if prefix else key, folder / key, on_bytes)


def _matching_keys(session: S3Session, prefix: str, patterns: tuple[str, ...], parts: ThreadPoolExecutor) -> list[str]:
    keys = S3Space(session, prefix, parts=parts).keys("")
    safe = (key for key in keys if not key.endswith("/") and ".." not in key.split("/"))
    return [key for key in safe if any(fnmatch(key.rsplit("/", 1)[-1], pattern) for pattern in patterns)]
