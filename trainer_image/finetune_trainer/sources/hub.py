"""The Hugging Face Hub: a branch or tag is pinned to a commit first, then exactly that commit is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    from finetune_trainer.sources.fetch import SourceAccess

TOKEN_FILE = "HF_TOKEN"  # noqa: S105 (a file name)


def fetch_from_hub(
    repository: str,
    revision: str | None,
    folder: Path,
    patterns: tuple[str, ...],
    access: SourceAccess,
    *,
    is_model: bool,
) -> str:
    """Download the files that match a pattern into `folder`; returns the commit. Raises TrainerError."""
    import httpx
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    kind = "model" if is_model else "dataset"
    token = _token(access.credentials)
    try:
        api = HfApi(endpoint=access.hub_endpoint, token=token)
        commit = str(api.repo_info(repository, repo_type=kind, revision=revision).sha)
        snapshot_download(
            repository,
            repo_type=kind,
            revision=commit,
            local_dir=folder,
            allow_patterns=list(patterns),
            token=token,
            endpoint=access.hub_endpoint,
        )
    except HfHubHTTPError as error:
        raise _translate(error, repository, revision, is_model=is_model) from None
    except (httpx.HTTPError, LocalEntryNotFoundError) as error:
        message = f"hf://{repository}: the hub did not answer ({type(error).__name__})"
        raise TrainerError(FailureReason.HUB_UNAVAILABLE, message) from None
    return commit


def _token(credentials: Path | None) -> str | bool:
    """The token of the Secret; False asks anonymously and never takes a token from elsewhere."""
    path = credentials / TOKEN_FILE if credentials else None
    return path.read_text().strip() if path and path.is_file() else False


def _translate(error: Exception, repository: str, revision: str | None, *, is_model: bool) -> TrainerError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", 0)
    not_found = FailureReason.MODEL_NOT_FOUND if is_model else FailureReason.DATASET_NOT_FOUND
    denied = FailureReason.MODEL_ACCESS_DENIED if is_model else FailureReason.DATASET_ACCESS_DENIED
    if isinstance(error, GatedRepoError):
        return TrainerError(denied, f"hf://{repository} is gated: its licence must be accepted and a token given")
    if isinstance(error, RevisionNotFoundError):
        return TrainerError(not_found, f"hf://{repository} has no revision {revision}")
    if isinstance(error, RepositoryNotFoundError):
        return TrainerError(not_found, f"hf://{repository} does not exist, or is private and no token may see it")
    if status in (401, 403):
        return TrainerError(denied, f"hf://{repository}: the hub refused the token (HTTP {status})")
    return TrainerError(FailureReason.HUB_UNAVAILABLE, f"hf://{repository}: the hub answered HTTP {status}")
