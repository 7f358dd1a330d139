"""Push of a committed result to a repository of the Hugging Face Hub, in one commit.

The push follows the commit in S3 and takes the manifest's files. An attempt that finds the result already in S3
(because the Hub failed the attempt before it, or the job was created again) pushes the same files, verified again.
huggingface_hub does not send files twice that the Hub already has.

In the repository, merged weights (without them, the adapter) lie at the top, where transformers and vLLM look for
them. GGUF files lie there as well, where llama.cpp and Ollama look.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx
from huggingface_hub import CommitOperationAdd, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, XetDownloadError

from finetune_api.failures import FailureReason
from finetune_api.spec.output import HubOutput
from finetune_api.vocabulary import ArtifactType
from finetune_trainer.artifacts.download import download_artifacts, local_path
from finetune_trainer.artifacts.manifest import Manifest
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.object_store import ObjectStore, ignore_bytes
from finetune_trainer.storage.retry import Cause, RetryPolicy, retry

log = logging.getLogger(__name__)
Value = TypeVar("Value")
TOKEN_FILE = "HF_TOKEN"  # noqa: S105 (a file name)
TIMEOUT = httpx.Timeout(60, connect=10, read=300)
"""Seconds without a byte. The answer to a commit takes the longest: the Hub checks its files first."""
PUSH_RETRIES = RetryPolicy(outage_seconds=300, first_wait=1)
_RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
# hf_xet, in Rust, raises RuntimeError; huggingface_hub raises ValueError for answers that it cannot read.
_RETRIED_ERRORS = (HfHubHTTPError, httpx.HTTPError, XetDownloadError, ValueError, RuntimeError)


class HubTarget:
    """The model repository that a job pushes to."""

    def __init__(
        self, output: HubOutput, token: str, endpoint: str | None = None, retries: RetryPolicy = PUSH_RETRIES
    ) -> None:
        """`endpoint` None is huggingface.co."""
        self._name = output.repository
        self._private = output.private
        self._retries = retries
        self._api = HfApi(endpoint=endpoint, token=token, library_name="finetune-operator")
        get_session().timeout = TIMEOUT  # huggingface_hub waits for ever for uploads and commits

    def prepare(self) -> None:
        """Creates the repository, or checks the existing one, before any GPU time is spent.

        Raises TrainerError (HubNotWritable, HubUnavailable).
        """
        if (is_private := self._retry(self._find_visibility)) is None:
            self._retry(lambda: self._api.create_repo(self._name, private=self._private, repo_type="model"))
            is_private = self._retry(self._find_visibility)

        if is_private is not None and is_private != self._private:
            is_now, wanted = ("private", "public") if is_private else ("public", "private")
            message = f"{self._name} is {is_now}, but spec.output.hub says {wanted}: change one of the two"
            raise TrainerError(FailureReason.HUB_NOT_WRITABLE, message)

        self._retry(lambda: self._api.auth_check(self._name, repo_type="model", write=True))

    def _find_visibility(self) -> bool | None:
        """Returns True for a private repository; None if it does not exist, or if this token may not see it."""
        try:
            return bool(self._api.model_info(self._name, timeout=30).private)
        except RepositoryNotFoundError:
            return None

    def push(self, files: dict[str, Path], message: str) -> str:
        """Commits files ({path in the repository: local path}); returns the commit's address. Raises TrainerError."""

        def commit() -> str:
            additions = [CommitOperationAdd(path, str(local)) for path, local in sorted(files.items())]
            done = self._api.create_commit(self._name, additions, commit_message=message, repo_type="model")
            return str(done.commit_url)

        return self._retry(commit)

    def _retry(self, action: Callable[[], Value]) -> Value:
        return retry(action, self._retries, _RETRIED_ERRORS, self._explain)

    def _explain(self, error: Exception) -> tuple[TrainerError, Cause]:
        failure = self._translate(error)
        return failure, Cause.OUTAGE if failure.reason is FailureReason.HUB_UNAVAILABLE else Cause.PERMANENT

    def _translate(self, error: Exception) -> TrainerError:
        """Returns our error for one of huggingface_hub, whose text quotes addresses and headers of the request."""
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0

        if status in (401, 403, 404, 409):
            message = f"the hub does not let this token write to {self._name} (HTTP {status})"
            return TrainerError(FailureReason.HUB_NOT_WRITABLE, message)
        if status and status not in _RETRIED_STATUS:
            return TrainerError(FailureReason.HUB_NOT_WRITABLE, f"the hub refused {self._name}: HTTP {status}")

        answer = f"answered HTTP {status}" if status else f"did not answer properly ({type(error).__name__})"
        return TrainerError(FailureReason.HUB_UNAVAILABLE, f"{self._name}: the hub {answer}")


def open_hub(output: HubOutput | None, credentials: Path | None, endpoint: str | None = None) -> HubTarget | None:
    """Returns the repository of `output`, or None without it. The token comes from the mounted Secret only.

    Raises TrainerError if the Secret holds no token.
    """
    if output is None:
        return None

    path = credentials / TOKEN_FILE if credentials else None
    token = path.read_text(encoding="utf-8").strip() if path and path.is_file() else ""
    if not token:
        secret = output.credentials.secret_name
        message = f"spec.output.hub needs a token: {TOKEN_FILE} is not in the Secret {secret}; add it"
        raise TrainerError(FailureReason.HUB_NOT_WRITABLE, message)

    return HubTarget(output, token, endpoint)


def push_result(hub: HubTarget | None, store: ObjectStore, manifest: Manifest, folder: Path) -> str | None:
    """Pushes all files of the manifest and returns the commit's address; without a hub, returns None.

    Files that are not yet in `folder` are downloaded into it first.
    """
    if hub is None:
        return None

    download_artifacts(store, manifest.artifacts, folder, ignore_bytes)
    files = {path: folder / local for path, local in repository_paths(manifest).items()}
    log.info("pushing %d files to the hub", len(files))
    return hub.push(files, f"{manifest.job.name}: {manifest.spec_digest[:12]}")


def repository_paths(manifest: Manifest) -> dict[str, Path]:
    """Returns {path in the repository: path in a download of the result}."""
    types = {artifact.type for artifact in manifest.artifacts}
    # With merged weights at the top, the adapter's files would mix with theirs.
    below = {ArtifactType.ADAPTER: "adapter/"} if ArtifactType.MERGED in types else {}
    paths = {}

    for artifact in manifest.artifacts:
        for file in artifact.files:
            local = local_path(file)
            paths[below.get(artifact.type, "") + Path(*local.parts[1:]).as_posix()] = local
    return paths
