"""Refusals of the API server, the network and a kubeconfig, each in a sentence that says what to do."""

import difflib
import json
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

from finetune_client.terminal.text import clean


class Exit(IntEnum):
    """Exit codes of the commands that talk to a cluster; docs/client.md lists them."""

    OK = 0
    REFUSED = 1
    """The cluster refused, for a reason that has no code of its own."""

    USAGE = 2
    NOT_FOUND = 3
    FORBIDDEN = 4
    NO_CLUSTER = 5
    """No kubeconfig, no such context, no connection, or no valid login."""

    NO_CRD = 6
    JOB_FAILED = 7
    """`--wait`, `--follow` or `watch JOB`: the job that was waited for has failed."""

    INVALID = 10
    """The manifest is invalid, as with `finetune run` and `finetune validate`."""


class ClientError(Exception):
    """A failure that the user reads as one sentence."""

    def __init__(self, message: str, code: Exit = Exit.REFUSED) -> None:
        super().__init__(message)
        self.message, self.code = message, code


def explain_answer(error: Any, verb: str, resource: str, namespace: str) -> ClientError:
    """Explain a kubernetes ApiException that `verb` on `resource` of `namespace` met."""
    details = _details(error)
    said = clean(details.get("message") or error.reason or error)
    if error.status == 401:
        return ClientError(
            "the cluster does not accept your login (401): it has expired or is of another cluster; log in again, "
            "or check the user of the context with `kubectl config view --minify`",
            Exit.NO_CLUSTER,
        )

    if error.status == 403:
        where = f"in namespace {namespace}" if namespace else "in the whole cluster"
        return ClientError(
            f"you may not {verb} {resource} {where}: ask an administrator for a role with verb {verb} on {resource} "
            f"there, or name another namespace with -n (the cluster said: {said})",
            Exit.FORBIDDEN,
        )

    if error.status in (400, 422):
        causes = (details.get("details") or {}).get("causes") or ()
        found = [f"{clean(each.get('field', ''))}: {clean(each.get('message', ''))}" for each in causes]
        return ClientError(f"the manifest is invalid: {'; '.join(found) or said}", Exit.INVALID)

    return ClientError(f"the cluster refused to {verb} {resource} ({error.status}): {said}")


def no_crd() -> ClientError:
    """Return the error of a cluster without our resource."""
    return ClientError(
        "this cluster has no FineTuneJobs (finetunejobs.finetune.dev): ask an administrator to install the chart "
        "finetune-operator, or name another cluster with --context",
        Exit.NO_CRD,
    )


def no_job(name: str, namespace: str, others: Iterable[str]) -> ClientError:
    """Return the error of a job that does not exist, with the names most like it."""
    near = difflib.get_close_matches(name, list(others), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"`finetune list -n {namespace}` lists what there is"
    return ClientError(f"there is no job {name} in namespace {namespace}: {hint}", Exit.NOT_FOUND)


def explain_network(error: Exception, server: str) -> ClientError:
    """Explain an error of urllib3 on the way to `server`."""
    cause = getattr(error, "reason", None) or error
    said = clean(cause, 300)

    if "CERTIFICATE" in said.upper() or "SSL" in type(cause).__name__.upper():
        return ClientError(
            f"the certificate of {server} is not trusted: check certificate-authority and server of the context "
            f"({said})",
            Exit.NO_CLUSTER,
        )

    return ClientError(
        f"the cluster at {server} cannot be reached: check the network, the VPN and the context "
        f"(`kubectl config get-contexts`); {said}",
        Exit.NO_CLUSTER,
    )


def _details(error: Any) -> dict[str, Any]:
    try:
        parsed = json.loads(error.body or "{}")
    except (TypeError, ValueError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
