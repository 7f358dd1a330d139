"""Find out, before any GPU time is spent, whether the output can be written and what the store guarantees.

A canary object is written and deleted below the job's prefix. Between the two, the store is asked to do two things
wrong: to replace the canary although it exists, and to take content with a wrong checksum. A store that refuses both
keeps commits apart and checks transfers itself; whoever claims a feature without having it is found out here, not
when artifacts are lost.
"""

import logging
from base64 import b64encode
from typing import Any

from awscrt import checksums

from finetune_trainer.storage.digests import crc64_header
from finetune_trainer.storage.s3_faults import FaultKind, S3Fault
from finetune_trainer.storage.s3_session import PROBE_PATIENCE, Patience, S3Session
from finetune_trainer.storage.s3_upload import ChecksumSupport

log = logging.getLogger(__name__)

CANARY = b"canary\n"
_WRONG_CHECKSUM = b64encode(b"wrong!!!").decode()
_REFUSALS = (FaultKind.CORRUPTED, FaultKind.UNSUPPORTED, FaultKind.REFUSED)
# One request each: a refusal is an answer here, and a checksum error would otherwise be repeated as a broken transfer.
_ONCE = Patience(outage_seconds=0, expired_seconds=0, rejected_seconds=0)


def observe_checksum_support(session: S3Session, key: str) -> ChecksumSupport:
    """Write and delete the canary `key`; says what the store does with checksums.

    Raises S3Fault where the bucket is missing or cannot be written.
    """
    support = ChecksumSupport.STORED
    if _refused(session, key, patience=PROBE_PATIENCE, **_checksum(crc64_header(checksums.crc64nvme(CANARY)))):
        session.call("put_object", key, Body=CANARY, patience=PROBE_PATIENCE)
        support = ChecksumSupport.REFUSED
    elif _refused(session, key, patience=_ONCE, **_checksum(_WRONG_CHECKSUM)):
        support = ChecksumSupport.CHECKED
    if not _keeps_existing(session, key):
        log.warning("%s ignores If-None-Match: two pods that commit at once would not be kept apart", session.bucket)
    session.call("delete_object", key, patience=PROBE_PATIENCE)
    log.info("output is writable; the store %s (CRC64-NVME)", support.value)
    return support


def _checksum(value: str) -> dict[str, str]:
    return {"ChecksumAlgorithm": "CRC64NVME", "ChecksumCRC64NVME": value}


def _refused(session: S3Session, key: str, patience: Patience, **parameters: Any) -> bool:
    try:
        session.call("put_object", key, Body=CANARY, patience=patience, **parameters)
    except S3Fault as fault:
        if fault.kind in _REFUSALS:
            return True
        raise
    return False


def _keeps_existing(session: S3Session, key: str) -> bool:
    try:
        session.call("put_object", key, Body=CANARY, IfNoneMatch="*", patience=PROBE_PATIENCE)
    except S3Fault as fault:
        if fault.kind is FaultKind.PRECONDITION:
            return True
        if fault.kind in _REFUSALS:
            return False
        raise
    return False
