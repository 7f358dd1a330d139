"""Bounds of an energy that a pod reports: whoever may change a pod can write any number."""

MAX_WATTS_PER_GPU = 1500
"""No GPU takes more: the largest, NVIDIA's B300, is built for 1,400 W."""

_CLOCK_SECONDS = 60
"""The pod reads its counter by another clock than the one that its time is counted by."""

JOULES_PER_WATT_HOUR = 3600


def is_believable(joules: int, gpus: int, held_seconds: int) -> bool:
    """Returns True if so many GPUs can have taken this energy in the seconds that their pod held its node."""
    return 0 <= joules <= MAX_WATTS_PER_GPU * gpus * (held_seconds + _CLOCK_SECONDS)
