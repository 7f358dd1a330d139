"""Reads the API server's answers, which may come from something else: a proxy, a login page, a load balancer (pure)."""

import json
from collections.abc import Mapping

from finetune_api.base import Json
from finetune_operator.errors import ApiUnavailableError

MAX_PAUSE_SECONDS = 600.0
"""Longest time that a server's Retry-After may silence the operator."""


def read_retry_after(headers: Mapping[str, str]) -> float:
    """Seconds in the header Retry-After; 0 without it. The API server never writes a date, which HTTP allows too."""
    value = headers.get("Retry-After", "")
    return min(MAX_PAUSE_SECONDS, float(value)) if value.isdecimal() else 0.0


def decode_object(label: str, text: str) -> Json:
    """Reads the object in a good answer. A proxy, a login page or a connection that was cut may have sent anything."""
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and "kind" in answer:
        return answer

    what = f"starts with {text[:200]!r}" if text else "is empty"
    raise ApiUnavailableError(
        f"{label}: the answer is no object of Kubernetes: it {what}; is there a proxy in between?"
    )


def read_message(text: str) -> str:
    """The message of the API server's Status object; a proxy in between may answer with anything else."""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
