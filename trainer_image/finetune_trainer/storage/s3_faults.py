"""Failures of S3: botocore's errors, sorted into kinds that are handled in the same way.

A message holds error code, operation, bucket and key only: botocore's own text may quote the request, and a store's
text may quote an access key. The failure reason of a kind depends on the use (output, model, dataset), so the caller
passes a `FaultReasons`.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions as boto_errors
import urllib3.exceptions

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.endpoint_checks import EndpointRefusedError, explain_untrusted
from finetune_trainer.storage.retry import Cause


class FaultKind(StrEnum):
    """Kinds of S3 failures; those of one kind are handled in the same way. The value completes an error message."""

    BUCKET_MISSING = "the bucket does not exist"
    KEY_MISSING = "the object does not exist"
    DENIED = "access was denied"
    REJECTED = "the credentials were rejected"
    EXPIRED = "the credentials have expired"
    NO_CREDENTIALS = "there are no usable credentials"
    WRONG_REGION = "the bucket is in another region"
    PRECONDITION = "the object was changed by someone else"
    UPLOAD_LOST = "the unfinished upload was discarded, probably by a newer attempt"
    CORRUPTED = "the content arrived damaged"
    UNSUPPORTED = "the store does not support the request"
    UNAVAILABLE = "the store did not answer or asked to slow down"
    REFUSED = "the store refused the request"
    NOT_ALLOWED = "the endpoint is not allowed"
    REDIRECTED = "the endpoint redirects, which is not followed"
    UNTRUSTED = "the store cannot be trusted"

    @property
    def cause(self) -> Cause:
        """Cause that decides how long such a failure is retried."""
        return _CAUSES.get(self, Cause.PERMANENT)


_CAUSES = {
    FaultKind.UNAVAILABLE: Cause.OUTAGE,
    FaultKind.CORRUPTED: Cause.OUTAGE,  # damaged on the way: the next transfer may be whole
    FaultKind.EXPIRED: Cause.EXPIRED,
    FaultKind.REJECTED: Cause.REJECTED,
}

_KIND_BY_CODE: dict[str, FaultKind] = {
    "NoSuchBucket": FaultKind.BUCKET_MISSING,
    "NoSuchKey": FaultKind.KEY_MISSING,
    "AccessDenied": FaultKind.DENIED,
    "AccountProblem": FaultKind.DENIED,
    "AllAccessDisabled": FaultKind.DENIED,
    "InvalidAccessKeyId": FaultKind.REJECTED,
    "SignatureDoesNotMatch": FaultKind.REJECTED,
    "InvalidToken": FaultKind.REJECTED,
    "ExpiredToken": FaultKind.EXPIRED,
    "ExpiredTokenException": FaultKind.EXPIRED,
    "TokenRefreshRequired": FaultKind.EXPIRED,
    "RequestExpired": FaultKind.EXPIRED,
    "PermanentRedirect": FaultKind.WRONG_REGION,
    "AuthorizationHeaderMalformed": FaultKind.WRONG_REGION,
    "IllegalLocationConstraintException": FaultKind.WRONG_REGION,
    "PreconditionFailed": FaultKind.PRECONDITION,
    "ConditionalRequestConflict": FaultKind.UNAVAILABLE,  # two writes met: S3 asks to repeat the request
    "NoSuchUpload": FaultKind.UPLOAD_LOST,
    "BadDigest": FaultKind.CORRUPTED,
    "XAmzContentChecksumMismatch": FaultKind.CORRUPTED,
    "XAmzContentSHA256Mismatch": FaultKind.CORRUPTED,
    "IncompleteBody": FaultKind.CORRUPTED,
    "NotImplemented": FaultKind.UNSUPPORTED,
    "InvalidArgument": FaultKind.UNSUPPORTED,
    "InvalidRequest": FaultKind.UNSUPPORTED,
    "SlowDown": FaultKind.UNAVAILABLE,
    "RequestTimeout": FaultKind.UNAVAILABLE,
    "RequestTimeTooSkewed": FaultKind.REFUSED,
    "Throttling": FaultKind.UNAVAILABLE,
    "ThrottlingException": FaultKind.UNAVAILABLE,
    "TooManyRequests": FaultKind.UNAVAILABLE,
}
_KIND_BY_STATUS: dict[int, FaultKind] = {
    301: FaultKind.WRONG_REGION,
    401: FaultKind.DENIED,
    403: FaultKind.DENIED,
    404: FaultKind.KEY_MISSING,
    408: FaultKind.UNAVAILABLE,
    412: FaultKind.PRECONDITION,
    429: FaultKind.UNAVAILABLE,
}
# botocore's EndpointConnectionError (nobody listens, because the store restarts) is a ConnectionError of botocore, and
# neither an HTTPClientError nor an OSError.
_NO_ANSWER = (
    boto_errors.ConnectionError,
    boto_errors.HTTPClientError,
    boto_errors.IncompleteReadError,
    urllib3.exceptions.HTTPError,
    OSError,
)


@dataclass(frozen=True)
class FaultReasons:
    """Failure reasons of one use of S3: writing the output, reading the model, or reading the dataset."""

    bucket_missing: FailureReason
    key_missing: FailureReason
    denied: FailureReason

    def reason(self, kind: FaultKind) -> FailureReason:
        """Failure reason of a kind in this use."""
        match kind:
            case FaultKind.BUCKET_MISSING:
                return self.bucket_missing
            case FaultKind.KEY_MISSING:
                return self.key_missing
            case FaultKind.UNAVAILABLE | FaultKind.UPLOAD_LOST | FaultKind.PRECONDITION:
                return FailureReason.STORAGE_UNAVAILABLE
            case FaultKind.NOT_ALLOWED:
                return FailureReason.ENDPOINT_NOT_ALLOWED
            case FaultKind.REDIRECTED:
                return FailureReason.ENDPOINT_REDIRECTED
            case FaultKind.UNTRUSTED:
                return FailureReason.CERTIFICATE_NOT_TRUSTED
            case FaultKind.CORRUPTED:
                return FailureReason.UPLOAD_CORRUPTED
            case _:
                return self.denied


OUTPUT_REASONS = FaultReasons(
    FailureReason.BUCKET_NOT_FOUND, FailureReason.STORAGE_UNAVAILABLE, FailureReason.STORAGE_NOT_WRITABLE
)
MODEL_REASONS = FaultReasons(
    FailureReason.MODEL_NOT_FOUND, FailureReason.MODEL_NOT_FOUND, FailureReason.MODEL_ACCESS_DENIED
)
DATASET_REASONS = FaultReasons(
    FailureReason.DATASET_NOT_FOUND, FailureReason.DATASET_NOT_FOUND, FailureReason.DATASET_ACCESS_DENIED
)


class S3Fault(TrainerError):  # noqa: N818 (the rest of this package calls it a fault)
    """A failed S3 operation: a TrainerError for most callers, with its kind for code that can act on it."""

    def __init__(self, kind: FaultKind, reason: FailureReason, operation: str, where: str, code: str) -> None:
        super().__init__(reason, f"{operation} of {where}: {kind.value} ({code})")
        self.kind = kind


class RedirectedError(boto_errors.BotoCoreError):  # type: ignore[misc]  # botocore has no types
    """A store answered with a redirect."""

    fmt = "{target}"


def refuse_redirect(response_dict: dict[str, Any], **_: object) -> None:
    """Raises RedirectedError for an answer that redirects. It is a handler of botocore's event `before-parse`."""
    location = response_dict["headers"].get("location")
    if 300 <= response_dict["status_code"] < 400 and location:
        parts = urlsplit(location)  # path and query may hold a signature
        raise RedirectedError(
            target=f"to {parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else "to itself"
        )


def classify(error: BaseException) -> tuple[FaultKind, str]:
    """Returns kind and error code of an error that boto3 raised."""
    if isinstance(error, boto_errors.ClientError):
        details = error.response.get("Error", {})
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(details.get("Code", status))
        return _kind_of_response(code, status), code

    if isinstance(error, RedirectedError):
        return FaultKind.REDIRECTED, str(error)
    if isinstance(error, boto_errors.HTTPClientError) and isinstance(error.kwargs.get("error"), EndpointRefusedError):
        return FaultKind.NOT_ALLOWED, error.kwargs["error"].message

    if (untrusted := explain_untrusted(error)) is not None:
        return FaultKind.UNTRUSTED, untrusted

    code = type(error).__name__
    if isinstance(error, boto_errors.NoCredentialsError | boto_errors.PartialCredentialsError):
        return FaultKind.NO_CREDENTIALS, code
    if isinstance(error, boto_errors.CredentialRetrievalError | boto_errors.TokenRetrievalError):
        return FaultKind.EXPIRED, code
    if isinstance(error, boto_errors.FlexibleChecksumError):
        return FaultKind.CORRUPTED, code
    if isinstance(error, _NO_ANSWER):
        return FaultKind.UNAVAILABLE, code

    return FaultKind.REFUSED, code


def _kind_of_response(code: str, status: int) -> FaultKind:
    if code in _KIND_BY_CODE:
        return _KIND_BY_CODE[code]
    if code.startswith("KMS."):
        return FaultKind.DENIED

    if code.isdecimal():  # a HEAD request has no body, so botocore gives the status as the code
        status = int(code)
    if status >= 500:
        return FaultKind.UNSUPPORTED if status == 501 else FaultKind.UNAVAILABLE
    return _KIND_BY_STATUS.get(status, FaultKind.REFUSED)
