"""Doubts about a pod's last word: whoever may change a pod's status can write any address into it (pure).

A result is taken only from the job's own result location, and from an attempt of the job's own pods. One that was there
already may be of any attempt in this location.
"""

from collections.abc import Collection

from finetune_api.outcome import Outcome, Result
from finetune_api.spec.location import attempt_name, attempt_prefix

MAX_URI = 200  # characters of an address in a message; a forged one may have any length


def find_doubt(outcome: Outcome, location: str, job_uid: str, pod_uids: Collection[str]) -> str | None:
    """Returns why an outcome is not believed, as a sentence; None if nothing in it leads elsewhere.

    `location`: the job's result location, with a slash at its end. `pod_uids`: the pods of the job that may have
    written the result.
    """
    if outcome.result is Result.SUCCEEDED and outcome.preflight is None and outcome.manifest_uri is None:
        return "the pod says that the job succeeded, but names no manifest"

    attempts = tuple(attempt_prefix(attempt_name(job_uid, uid)) for uid in pod_uids)
    report = outcome.preflight.report_uri if outcome.preflight else None

    named = [(artifact.uri, ("attempts/",) if outcome.reused else attempts) for artifact in outcome.artifacts]
    named += [(uri, (name,)) for uri, name in ((outcome.manifest_uri, "manifest.json"), (report, "preflight/")) if uri]
    for uri, places in named:
        if not _lies_in(uri, location, places):
            shown = uri if len(uri) <= MAX_URI else f"{uri[:MAX_URI]}…"
            return f"the pod says that the job wrote {shown}, but this pod writes below {location} only"
    return None


def _lies_in(uri: str, location: str, places: tuple[str, ...]) -> bool:
    key = uri.removeprefix(location)
    is_plain = not {"", ".", ".."} & set(key.removesuffix("/").split("/"))
    return uri.startswith(location) and key.startswith(places) and is_plain
