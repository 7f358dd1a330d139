"""GPU time, waiting, cost and energy of a job, in words."""

from finetune_api.base import Json
from finetune_client.terminal.text import find, number, word


def describe_usage(job: Json) -> str:
    """Return what a job has used; empty before it held a GPU. What nobody knows is named as such."""
    usage = find(job, "status", "usage")
    seconds = number(usage, "gpuSeconds")
    if not seconds:
        return ""

    parts = [f"{seconds / 3600:.2f} GPU hours{_against_estimate(usage)}"]
    if waited := number(usage, "waitingSeconds"):
        parts.append(f"waited {_duration(waited)}")

    cost = number(usage, "cost")
    parts.append("cost unknown" if cost is None else f"{cost:,.2f} {word(usage, 'currency', limit=3)}".rstrip())
    parts.append(_energy(usage, seconds))
    return ", ".join(parts)


def _against_estimate(usage: Json) -> str:
    error = number(usage, "estimateErrorPercent")
    return "" if error is None else f" ({abs(error):.0f} % {'more' if error >= 0 else 'less'} than estimated)"


def _energy(usage: Json, seconds: float) -> str:
    energy, measured = number(usage, "energyWattHours"), number(usage, "energyMeasuredGpuSeconds") or 0
    if energy is None:
        return "energy not measured"
    text = f"{energy:,.1f} Wh" if energy < 1000 else f"{energy / 1000:,.2f} kWh"
    # Less than all, unless only the last seconds before a report are missing.
    return text if measured >= seconds else f"{text} in {measured / seconds:.0%} of that time"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
