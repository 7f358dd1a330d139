"""botocore's errors, sorted."""

import botocore.exceptions as boto_errors
import pytest
import urllib3.exceptions
from botocore.exceptions import ClientError

from finetune_trainer.storage.s3_faults import FaultKind, classify

RESPONSES = {
    "no bucket": ("NoSuchBucket", 404, FaultKind.BUCKET_MISSING),
    "HEAD of an absent key has no body": ("404", 404, FaultKind.KEY_MISSING),
    "HEAD that is denied has no body": ("403", 403, FaultKind.DENIED),
    "an expired token": ("ExpiredToken", 400, FaultKind.EXPIRED),
    "a store that is busy": ("SlowDown", 503, FaultKind.UNAVAILABLE),
    "a proxy before the store": ("502", 502, FaultKind.UNAVAILABLE),
    "an unknown server error": ("Whatever", 500, FaultKind.UNAVAILABLE),
    "an unknown refusal": ("Whatever", 400, FaultKind.REFUSED),
    "something that is not built": ("NotImplemented", 501, FaultKind.UNSUPPORTED),
    "a lost race": ("PreconditionFailed", 412, FaultKind.PRECONDITION),
    "a race that S3 did not decide": ("ConditionalRequestConflict", 409, FaultKind.UNAVAILABLE),
    "an encryption key": ("KMS.DisabledException", 400, FaultKind.DENIED),
    "damaged on the way": ("BadDigest", 400, FaultKind.CORRUPTED),
}


@pytest.mark.parametrize(("code", "status", "kind"), RESPONSES.values(), ids=RESPONSES)
def test_an_answer_has_a_kind(code: str, status: int, kind: FaultKind) -> None:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert classify(ClientError(response, "PutObject")) == (kind, code)


@pytest.mark.parametrize(
    "error",
    [
        boto_errors.EndpointConnectionError(endpoint_url="http://127.0.0.1:9"),
        boto_errors.ConnectTimeoutError(endpoint_url="http://127.0.0.1:9"),
        boto_errors.ReadTimeoutError(endpoint_url="http://127.0.0.1:9"),
        boto_errors.ConnectionClosedError(endpoint_url="http://127.0.0.1:9"),
        boto_errors.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        boto_errors.ResponseStreamingError(error="reset"),
        urllib3.exceptions.ProtocolError("reset"),
        ConnectionResetError("reset"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_answer_is_unavailable_and_so_tried_again(error: Exception) -> None:
    assert classify(error)[0] is FaultKind.UNAVAILABLE


def test_a_defect_of_ours_is_not_tried_again() -> None:
    assert classify(boto_errors.ParamValidationError(report="x"))[0] is FaultKind.REFUSED
