"""Push a committed result to a repository of the Hugging Face Hub, in one commit.

The push comes after the commit in S3 and takes the manifest's files: an attempt that finds the result already there
(because the Hub failed the one before it, or the job was created again) pushes the same files, verified again. Files
that the Hub has already are not sent twice (huggingface_hub sees to it).

In the repository, merged weights (or the adapter, where there are none) lie at the top, where transformers and vLLM
look for them, and so do GGUF files, where llama.cpp and Ollama look.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, XetDownloadError

from finetune_api.failures import FailureReason
from finetune_api.spec.output import HubOutput
from finetune_api.vocabulary import ArtifactType
from finetune_trainer.artifacts.download import download_artifacts, local_path
from finetune_trainer.artifacts.manifest import Manifest
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.object_store import ObjectStore, ignore_bytes

log = logging.getLogger(__name__)
Value = TypeVar("Value")
TOKEN_FILE = "HF_TOKEN"  # noqa: S105 (a file name)
PATIENCE_SECONDS = 300.0
FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS = 1.0, 30.0
_TRIED_AGAIN = (408, 429, 500, 502, 503, 504)


class HubTarget:
    """A model repository that may be written."""

    def __init__(
        self, output: HubOutput, token: str, endpoint: str | None = None, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        """`endpoint` None is the Hub itself."""
        self._name = output.repository
        self._private = output.private
        self._patience = patience_seconds
        self._api = HfApi(endpoint=endpoint, token=token, library_name="finetune-operator")

    def prepare(self) -> None:
        """Make the repository, or find it as it should be: before any GPU time is spent. Raises TrainerError
        (HubNotWritable, HubUnavailable)."""
        if (is_private := self._patiently(self._find_visibility)) is None:
            self._patiently(lambda: self._api.create_repo(self._name, private=self._private, repo_type="model"))
            is_private = self._patiently(self._find_visibility)
        if is_private is not None and is_private != self._private:
            is_now, wanted = ("private", "public") if is_private else ("public", "private")
            message = f"{self._name} is {is_now}, spec.output.hub says {wanted}: change one of the two"
            raise TrainerError(FailureReason.HUB_NOT_WRITABLE, message)
        self._patiently(lambda: self._api.auth_check(self._name, repo_type="model", write=True))

    def _find_visibility(self) -> bool | None:
        """Whether the repository is private; None where it does not exist, or this token may not know it."""
        try:
            return bool(self._api.model_info(self._name, timeout=30).private)
        except RepositoryNotFoundError:
            return None

    def push(self, files: dict[str, Path], message: str) -> str:
        """Commit files (by their path in the repository) and return the commit's address. Raises TrainerError."""

        def commit() -> str:
            additions = [CommitOperationAdd(path, str(local)) for path, local in sorted(files.items())]
            done = self._api.create_commit(self._name, additions, commit_message=message, repo_type="model")
            return str(done.commit_url)

        return self._patiently(commit)

    def _patiently(self, action: Callable[[], Value]) -> Value:
        deadline, wait = time.monotonic() + self._patience, FIRST_WAIT_SECONDS
        while True:
            try:
                return action()
            except (HfHubHTTPError, httpx.HTTPError, XetDownloadError, ValueError, RuntimeError) as error:
                # hf_xet, in Rust, raises RuntimeError; huggingface_hub ValueError for answers it cannot read.
                failure = self._translate(error)
                if failure.reason is not FailureReason.HUB_UNAVAILABLE or time.monotonic() + wait > deadline:
                    raise failure from None
                log.warning("%s; trying again in %.0f s", failure.message, wait)
                time.sleep(wait)
                wait = min(2 * wait, MAX_WAIT_SECONDS)

    def _translate(self, error: Exception) -> TrainerError:
        """Ours for one of huggingface_hub, whose text quotes addresses and headers of the request."""
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        if status in (401, 403, 404, 409):
            message = f"the hub does not let this token write to {self._name} (HTTP {status})"
            return TrainerError(FailureReason.HUB_NOT_WRITABLE, message)
        if status and status not in _TRIED_AGAIN:
            return TrainerError(FailureReason.HUB_NOT_WRITABLE, f"the hub refused {self._name}: HTTP {status}")
        answer = f"answered HTTP {status}" if status else f"did not answer as it should ({type(error).__name__})"
        return TrainerError(FailureReason.HUB_UNAVAILABLE, f"{self._name}: the hub {answer}")


def open_hub(output: HubOutput | None, credentials: Path | None, endpoint: str | None = None) -> HubTarget | None:
    """The repository that the job names, if it names one. The token comes from the mounted Secret and from nowhere
    else; raises TrainerError where there is none."""
    if output is None:
        return None
    path = credentials / TOKEN_FILE if credentials else None
    token = path.read_text(encoding="utf-8").strip() if path and path.is_file() else ""
    if not token:
        message = f"spec.output.hub needs a token: {TOKEN_FILE} is not in the Secret {output.credentials.secret_name}"
        raise TrainerError(FailureReason.HUB_NOT_WRITABLE, message)
    return HubTarget(output, token, endpoint)


def push_result(hub: HubTarget | None, store: ObjectStore, manifest: Manifest, folder: Path) -> str | None:
    """Push everything that the manifest names, and return the commit's address; files that `folder` lacks are
    downloaded into it first. None without a hub."""
    if hub is None:
        return None
    download_artifacts(store, manifest.artifacts, folder, ignore_bytes)
    files = {path: folder / local for path, local in repository_paths(manifest).items()}
    log.info("pushing %d files to the hub", len(files))
    return hub.push(files, f"{manifest.job.name}: {manifest.spec_digest[:12]}")


def repository_paths(manifest: Manifest) -> dict[str, Path]:
    """{path in the repository: path in a download of the result}."""
    types = {artifact.type for artifact in manifest.artifacts}
    below = {ArtifactType.ADAPTER: "adapter/"} if ArtifactType.MERGED in types else {}
    paths = {}
    for artifact in manifest.artifacts:
        for file in artifact.files:
            local = local_path(file)
            paths[below.get(artifact.type, "") + Path(*local.parts[1:]).as_posix()] = local
    return paths
