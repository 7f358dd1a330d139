"""Hints for failures on one's own machine: the API's speak of pods, Secrets and a job that is created again."""

from finetune_api.failures import FAILURES, FailureReason

_AGAIN = "then run the same command again"
LOCAL_HINTS = {
    FailureReason.INVALID_CONFIGURATION: f"Correct the named field or option, {_AGAIN}.",
    FailureReason.MODEL_ACCESS_DENIED: "Accept the model's licence on the Hub, and put a token into DIR/model/HF_TOKEN "
    "for --credentials DIR (S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY).",
    FailureReason.DATASET_ACCESS_DENIED: "Put a token that may read the data into DIR/dataset/HF_TOKEN for "
    "--credentials DIR (S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY).",
    FailureReason.OUT_OF_MEMORY: "Lower spec.model.maxSequenceLength, take a smaller model, or close other programs.",
    FailureReason.STORAGE_NOT_WRITABLE: "Give the credentials write access, or choose another folder with --output.",
    FailureReason.OUTPUT_EXISTS: "Choose another --name or --output, or add --set spec.output.s3.onExisting=Overwrite.",
    FailureReason.DISK_FULL: f"Free some disk (a run works in --output, else where TMPDIR says), {_AGAIN}.",
    FailureReason.EXPORT_FAILED: "The trained adapter is there. Make what is missing by the command above, or correct "
    f"spec.export, {_AGAIN}: it goes on from the last checkpoint.",
    FailureReason.HUB_UNAVAILABLE: f"Check the network, proxy and HF_ENDPOINT, {_AGAIN}.",
    FailureReason.HUB_NOT_WRITABLE: "Put a token that may write to the repository into DIR/hub/HF_TOKEN for "
    "--credentials DIR.",
    FailureReason.STORAGE_UNAVAILABLE: f"Check the network and spec.output.s3.endpointURL, {_AGAIN}.",
    FailureReason.CERTIFICATE_NOT_TRUSTED: "Put your authority's certificates and the public ones into one "
    f"file, name it in SSL_CERT_FILE, REQUESTS_CA_BUNDLE and AWS_CA_BUNDLE, {_AGAIN}.",
    FailureReason.NODE_UNREACHABLE: "Write spec.resources.nodes: 1: several nodes train together only on a cluster.",
    FailureReason.INTERNAL_ERROR: "This is a defect: run the same command with --verbose and report what it prints.",
}


def local_hint(reason: FailureReason) -> str:
    """Returns the hint for a failure of a local run; most of the API's hints hold everywhere."""
    return LOCAL_HINTS.get(reason, FAILURES[reason].hint)
