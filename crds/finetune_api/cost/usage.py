"""`status.usage`: what a job has used, and what that costs."""

from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel, Count, NonNegative

Currency = Annotated[str, Field(pattern="^[A-Z]{3}$")]
"""ISO 4217 code."""


class Usage(ApiModel):
    """GPU time, waiting, energy and cost of a job, over all of its pods."""

    gpu_seconds: Count = 0
    """Seconds that pods of the job have held a GPU, times the number of GPUs: from the node that a pod got to its end,
    with failed, evicted and suspended pods."""

    gpu_hours: NonNegative = 0
    """The same in hours."""

    waiting_seconds: Count = 0
    """Seconds that the job wanted to run and no pod of it held a node; suspension does not count."""

    currency: Currency | None = None
    """Currency of the cost, by its ISO 4217 code."""

    cost: NonNegative | None = None
    """Price of the GPU time; each pod's by the price at its start. Absent if a pod had no price, or another currency
    than the others."""

    estimated_gpu_seconds: Count | None = None
    """GPU-seconds of training that preflight estimated."""

    estimated_cost: NonNegative | None = None
    """Cost of the estimated GPU time, by the price at that moment."""

    estimate_error_percent: float | None = None
    """GPU time of a job that succeeded over the estimate, less 100 %: 25 means that it took a quarter more. Loading,
    export and upload are in the time and not in the estimate."""

    energy_watt_hours: NonNegative | None = None
    """Energy of the GPUs, as NVIDIA's driver counted it from the start of each trainer to its end. Absent if no pod
    could measure it."""

    energy_measured_gpu_seconds: Count | None = None
    """GPU-seconds of the pods whose energy that is; fewer than gpuSeconds if a pod could not measure it."""

    earlier_held_seconds: Count = 0
    """Seconds that pods held a node which `attempts` lists no more."""

    earlier_cost: NonNegative | None = None
    """Cost of these pods; absent if it is not known."""

    earlier_energy_joules: Count | None = None
    """Energy of those of these pods that measured it."""

    earlier_measured_seconds: Count | None = None
    """Seconds that these held a node."""
