"""Judges whether the job's disk holds what the job will write, where the job says how large it is. Pure."""

from collections.abc import Iterator, Sequence

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.spec.sources import Scheme, Source
from finetune_trainer.job.disk_needs import JobSize, describe_lack, plan_disk
from finetune_trainer.model.safetensors_header import TensorHeader
from finetune_trainer.preflight.report import Finding

STORAGE = "spec.resources.ephemeralStorage"
IN_PLACE = (Scheme.PVC, Scheme.FILE)


def judge_disk(
    config: RunConfig, weights: Sequence[TensorHeader], trained: int, tokens: int, copied_bytes: int = 0
) -> Iterator[Finding]:
    """An error if `ephemeralStorage` is too little for an adapter of `trained` parameters and `tokens` in all rows.

    `copied_bytes` are those of tensors that merged weights take over unchanged.
    """
    limit = config.ephemeral_storage_bytes
    if limit is None:
        return

    in_place = Source.parse(config.model.source).scheme in IN_PLACE
    base_bytes = 0 if in_place else sum(header.end - header.start for header in weights) + copied_bytes
    size = JobSize(sum(header.parameters for header in weights), trained, base_bytes, tokens, copied_bytes)
    if (lack := describe_lack(plan_disk(config, size), limit)) is not None:
        message = f"{lack}: raise it, or export less"
        yield Finding.error(STORAGE, message, FailureReason.DISK_FULL)
