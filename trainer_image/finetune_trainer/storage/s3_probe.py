"""Test of the output before any GPU time is spent: can it be written, and what does the store guarantee?

A canary object is written below the job's prefix, and deleted at the end. In between come two requests that a good
store refuses: replacing the canary although it exists, and storing content with a wrong checksum. A store that refuses
both keeps two commits apart and checks transfers itself. Stores are not asked for their features: some claim more than
they do.
"""

import logging
from base64 import b64encode
from typing import Any

from awscrt import checksums

from finetune_trainer.storage.digests import crc64_header
from finetune_trainer.storage.retry import RetryPolicy
from finetune_trainer.storage.s3_faults import FaultKind, S3Fault
from finetune_trainer.storage.s3_session import PROBE_RETRIES, S3Session
from finetune_trainer.storage.s3_upload import ChecksumSupport

log = logging.getLogger(__name__)

CANARY = b"canary\n"
_WRONG_CHECKSUM = b64encode(b"wrong!!!").decode()
_REFUSALS = (FaultKind.CORRUPTED, FaultKind.UNSUPPORTED, FaultKind.REFUSED)
# No retries: a refusal is the answer here. A checksum error is otherwise retried as a broken transfer.
_ONCE = RetryPolicy(outage_seconds=0, expired_seconds=0, rejected_seconds=0)


def observe_checksum_support(session: S3Session, key: str) -> ChecksumSupport:
    """Writes and deletes the canary `key`; returns what the store does with checksums.

    Raises S3Fault if the bucket does not exist or cannot be written.
    """
    # First the right checksum, then a wrong one: only a store that refuses exactly the second one checks it.
    support = ChecksumSupport.STORED
    if _refused(session, key, policy=PROBE_RETRIES, **_checksum(crc64_header(checksums.crc64nvme(CANARY)))):
        session.call("put_object", key, Body=CANARY, policy=PROBE_RETRIES)
        support = ChecksumSupport.REFUSED
    elif _refused(session, key, policy=_ONCE, **_checksum(_WRONG_CHECKSUM)):
        support = ChecksumSupport.CHECKED

    if not _keeps_existing(session, key):
        log.warning(
            "bucket %s ignores If-None-Match: if two pods of a job finish at once, the second overwrites the first's "
            "result",
            session.bucket,
        )

    session.call("delete_object", key, policy=PROBE_RETRIES)
    log.info("the output can be written; CRC64-NVME checksums: the store %s", support.value)
    return support


def _checksum(value: str) -> dict[str, str]:
    return {"ChecksumAlgorithm": "CRC64NVME", "ChecksumCRC64NVME": value}


def _refused(session: S3Session, key: str, policy: RetryPolicy, **parameters: Any) -> bool:
    try:
        session.call("put_object", key, Body=CANARY, policy=policy, **parameters)
    except S3Fault as fault:
        if fault.kind in _REFUSALS:
            return True
        raise
    return False


def _keeps_existing(session: S3Session, key: str) -> bool:
    try:
        session.call("put_object", key, Body=CANARY, IfNoneMatch="*", policy=PROBE_RETRIES)
    except S3Fault as fault:
        if fault.kind is FaultKind.PRECONDITION:
            return True
        if fault.kind in _REFUSALS:
            return False
        raise
    return False
