"""Sources on the Hugging Face Hub: a branch or tag is resolved to a commit first, then exactly that commit is fetched.

huggingface_hub resumes a file that broke off; around it, requests are retried when the hub does not answer. Its own
errors quote addresses and headers of the request, so our messages are written anew.
"""

import json
from collections.abc import Callable, Iterable
from glob import escape
from pathlib import Path
from typing import TypeVar

import httpx
from huggingface_hub import HfApi, get_session, hf_hub_url, set_client_factory, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]  # documented
from huggingface_hub.utils._http import default_client_factory

from finetune_api.failures import FailureReason
from finetune_api.spec.endpoints import EndpointPolicy
from finetune_trainer.errors import TrainerError
from finetune_trainer.sources.repository import SourceAccess
from finetune_trainer.storage.endpoint_checks import CheckedBackend, explain_untrusted
from finetune_trainer.storage.object_store import OnBytes
from finetune_trainer.storage.retry import Cause, retry
from finetune_trainer.storage.s3_faults import FaultReasons

Value = TypeVar("Value")
TOKEN_FILE = "HF_TOKEN"  # noqa: S105 (a file name)
REQUEST_SECONDS = 30
LISTING_SECONDS = 4
"""Time for the first, small answer of the hub, or for the next part of it: a hub that is silent is soon noticed."""
_NO_ANSWER = (httpx.HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, FileMetadataError, XetDownloadError)
_NOT_THE_HUB = (json.JSONDecodeError, KeyError, TypeError, AttributeError)
"""What huggingface_hub raises for an answer that is not the hub's, such as a proxy's page in HTML."""
_RETRIED_ERRORS = (*_NO_ANSWER, HFValidationError, HfHubHTTPError, EntryNotFoundError, *_NOT_THE_HUB)


def restrict_hub(policy: EndpointPolicy) -> None:
    """Lets huggingface_hub connect only where the policy allows it, at every hop of a redirect. Patterns of hosts are
    for endpoints that users write, so they do not count here: the Hub redirects large files to a CDN."""

    def build() -> httpx.Client:
        client = default_client_factory()
        pool = client._transport._pool  # type: ignore[attr-defined]  # httpx has no setting for its backend
        pool._network_backend = CheckedBackend(pool._network_backend, policy)
        return client

    set_client_factory(build)


class HubRepository:
    """A model or dataset repository at one commit."""

    incomplete = FailureReason.HUB_UNAVAILABLE

    def __init__(self, name: str, kind: str, revision: str | None, access: SourceAccess, reasons: FaultReasons) -> None:
        """Asks the hub for the commit of `revision` and for its files. `kind` is "model" or "dataset"."""
        self._name = name
        self._kind = kind
        self._asked = revision
        self._access = access
        self._reasons = reasons
        self._token = _token(access.credentials)

        api = HfApi(endpoint=access.hub_endpoint, token=self._token)
        ask = api.model_info if kind == "model" else api.dataset_info
        info = self._retry(lambda: ask(name, revision=revision, files_metadata=True, timeout=LISTING_SECONDS))

        # A branch may move while the job runs: from here on only the commit is used.
        self.revision = str(info.sha)
        siblings = info.siblings or ()
        self.files = {sibling.rfilename: int(sibling.size or 0) for sibling in siblings}
        self.sha256 = {sibling.rfilename: sibling.lfs.sha256 for sibling in siblings if sibling.lfs is not None}

    def version(self, names: Iterable[str]) -> str:
        """Returns the commit."""
        return self.revision

    def download_size(self, names: Iterable[str]) -> int:
        """Returns the size of the files in bytes; 0 for the Hub's own cache, which is on another disk or has them."""
        if self._access.hub_cache:
            return 0
        return sum(self.files[name] for name in names)

    def download(self, names: Iterable[str], folder: Path, on_bytes: OnBytes) -> Path:
        """Downloads files of the commit into `folder`, several at a time; returns the folder that they are in."""
        listed = list(names)

        found = self._retry(
            lambda: snapshot_download(
                self._name,
                repo_type=self._kind,
                revision=self.revision,
                local_dir=None if self._access.hub_cache else folder,
                # These are patterns: a file name with brackets has to be escaped.
                allow_patterns=[escape(name) for name in listed],
                token=self._token,
                endpoint=self._access.hub_endpoint,
            )
        )

        on_bytes(self.download_size(listed))
        return Path(found) if self._access.hub_cache else folder

    def read(self, name: str, start: int, end: int) -> bytes:
        """Returns bytes [start, end) of a file of the commit, by a range request."""
        return self._retry(lambda: self._read(name, start, end))

    def _read(self, name: str, start: int, end: int) -> bytes:
        endpoint = self._access.hub_endpoint
        address = hf_hub_url(self._name, name, repo_type=self._kind, revision=self.revision, endpoint=endpoint)
        headers = {**build_hf_headers(token=self._token), "Range": f"bytes={start}-{end - 1}"}

        with get_session().stream("GET", address, headers=headers, timeout=REQUEST_SECONDS) as answer:
            hf_raise_for_status(answer)
            # A server or proxy that knows no ranges sends the whole file, of which no more than needed is read.
            skipped = 0 if answer.status_code == httpx.codes.PARTIAL_CONTENT else start
            data = _read_up_to(answer, skipped + end - start)[skipped:]

        if len(data) < end - start:
            raise httpx.RemoteProtocolError(f"only {len(data)} of {end - start} bytes of {name} arrived")
        return data

    def _retry(self, action: Callable[[], Value]) -> Value:
        return retry(action, self._access.hub_retries, _RETRIED_ERRORS, self._explain)

    def _explain(self, error: Exception) -> tuple[TrainerError, Cause]:
        failure = self._translate(_refusal_behind(error))
        passes = failure.reason is FailureReason.HUB_UNAVAILABLE and not isinstance(error, _NOT_THE_HUB)
        return failure, Cause.OUTAGE if passes else Cause.PERMANENT

    def _translate(self, error: Exception) -> TrainerError:
        where, missing, denied = f"hf://{self._name}", self._reasons.key_missing, self._reasons.denied

        if isinstance(error, httpx.TooManyRedirects):
            return TrainerError(FailureReason.ENDPOINT_REDIRECTED, f"{where}: the hub redirects in a circle")
        if isinstance(error, GatedRepoError):
            message = (
                f"{where} is gated: accept its licence on the Hub, and put a token of that account into the Secret"
            )
            return TrainerError(denied, message)
        if isinstance(error, RevisionNotFoundError):
            return TrainerError(missing, f"{where} has no revision {self._asked or 'main'}")

        # The Hub answers 401 for a repository that does not exist, if the request had no token.
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        if isinstance(error, RepositoryNotFoundError) and (status != 401 or not self._token):
            return TrainerError(
                missing, f"{where} does not exist, or is private and the token (if any) may not read it"
            )
        if status in (401, 403):
            refused = "the token" if self._token else "a request without a token"
            return TrainerError(denied, f"{where}: the hub refused {refused} (HTTP {status})")
        if isinstance(error, _NOT_THE_HUB):
            message = (
                f"{where}: the answer is not the hub's, as if a proxy or a login page stood between: check HF_ENDPOINT "
                "and the proxy's settings"
            )
            return TrainerError(FailureReason.HUB_UNAVAILABLE, message)
        if isinstance(error, HFValidationError):
            return TrainerError(missing, f"{where} is not a valid name of a repository: write hf://owner/name")
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return TrainerError(missing, f"{where} lists a file that does not exist")

        if (untrusted := explain_untrusted(error)) is not None:
            return TrainerError(FailureReason.CERTIFICATE_NOT_TRUSTED, f"{where}: {untrusted}")

        # Everything else may pass with time, such as HTTP 429 and 5xx.
        answer = f"answered HTTP {status}" if status else f"did not answer ({type(error).__name__})"
        return TrainerError(FailureReason.HUB_UNAVAILABLE, f"{where}: the hub {answer}")


def _refusal_behind(error: Exception) -> Exception:
    """The hub's refusal that huggingface_hub hides behind "not found on this disk"; else the error itself."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    return cause if isinstance(cause, HfHubHTTPError) else error


def _read_up_to(answer: httpx.Response, count: int) -> bytes:
    """Returns the first `count` bytes of an answer, or fewer if it ends before."""
    data = bytearray()
    for piece in answer.iter_bytes():
        data += piece
        if len(data) >= count:
            break
    return bytes(data[:count])


def _token(credentials: Path | None) -> str | bool:
    """Returns the token of the mounted Secret; False asks anonymously, whatever tokens this machine has."""
    path = credentials / TOKEN_FILE if credentials else None
    return path.read_text().strip() if path and path.is_file() else False
