"""The cluster of a kubeconfig, or of the pod that this runs in, by the official client and with the user's rights."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from urllib3.exceptions import HTTPError
from yaml import YAMLError

from finetune_api import GROUP, PLURAL, VERSION
from finetune_api.base import Json
from finetune_client.errors import ClientError, Exit, explain_answer, explain_network, no_crd, no_job
from finetune_client.terminal.text import clean

RESOURCE = f"{PLURAL}.{GROUP}"
TIMEOUT = (5, 30)
"""Seconds to connect, and to wait for an answer."""
_IN_POD = "KUBERNETES_SERVICE_HOST"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Cluster:
    """FineTuneJobs, pods, events and nodes of one cluster; every refusal is raised as a ClientError."""

    def __init__(self, api_client: Any, namespace: str) -> None:
        self.namespace = namespace
        self.server = str(api_client.configuration.host)
        self.core: Any = client.CoreV1Api(api_client)
        self._jobs: Any = client.CustomObjectsApi(api_client)

    @classmethod
    def open(cls, kubeconfig: str | None, context: str | None, namespace: str | None) -> "Cluster":
        """Open the cluster of a kubeconfig; without one, that of the pod. Raises ClientError."""
        with _noticed_plugin_errors() as said:
            try:
                settings, own = _load(kubeconfig, context)
            except ConfigException as error:
                raise ClientError(_explain_config(error, context), Exit.NO_CLUSTER) from None
            except (OSError, ValueError, TypeError, AttributeError, YAMLError) as error:
                message = f"the kubeconfig cannot be read: {clean(error, 300)}"
                raise ClientError(message, Exit.NO_CLUSTER) from None

        if said:
            message = (
                f"the login program of the context failed: {said[0]}; install it or log in again, "
                "and try `kubectl auth whoami`"
            )
            raise ClientError(message, Exit.NO_CLUSTER)

        settings.retries = False
        return cls(client.ApiClient(settings), namespace or own)

    @contextmanager
    def explained(
        self,
        verb: str,
        resource: str,
        namespace: str,
        missing: Callable[[ApiException], ClientError] | None = None,
    ) -> Iterator[None]:
        """Raise what goes wrong inside as a ClientError; `missing` explains the answer 404."""
        try:
            yield
        except ApiException as error:
            if missing is not None and error.status == 404:
                raise missing(error) from None
            # The client reports a certificate that it does not trust as an answer of status 0.
            raise (
                explain_answer(error, verb, resource, namespace)
                if error.status
                else explain_network(error, self.server)
            ) from None
        except HTTPError as error:
            raise explain_network(error, self.server) from None

    def list_jobs(self, namespace: str | None) -> list[Json]:
        """List the jobs of a namespace, or of all for None."""
        with self.explained("list", RESOURCE, namespace or "", missing=lambda _: no_crd()):
            found = (
                self._jobs.list_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, _request_timeout=TIMEOUT)
                if namespace
                else self._jobs.list_cluster_custom_object(GROUP, VERSION, PLURAL, _request_timeout=TIMEOUT)
            )

        items: list[Json] = found["items"]
        return items

    def get_job(self, name: str) -> Json:
        """Get one job. Raises ClientError with the nearest names if there is none."""
        with self.explained("get", RESOURCE, self.namespace, missing=lambda _: self._explain_missing(name)):
            found: Json = self._jobs.get_namespaced_custom_object(*self._path(), name, _request_timeout=TIMEOUT)
        return found

    def create_job(self, body: Json, *, dry_run: bool = False) -> Json:
        """Create a job, or only ask the API server whether it would; unknown fields are an error."""
        options = {"dry_run": "All"} if dry_run else {}

        with self.explained("create", RESOURCE, self.namespace, missing=self._explain_missing_place):
            try:
                created: Json = self._jobs.create_namespaced_custom_object(
                    *self._path(), body, field_validation="Strict", _request_timeout=TIMEOUT, **options
                )
            except ApiException as error:
                if error.status == 409:
                    name = clean(body["metadata"]["name"])
                    message = (
                        f"job {name} exists already in namespace {self.namespace}: choose another name, "
                        f"or run a failed one again with `finetune retry {name}`"
                    )
                    raise ClientError(message) from None
                raise
        return created

    def patch_job(self, name: str, body: Json) -> None:
        """Merge a change into a job."""
        with self.explained("patch", RESOURCE, self.namespace, missing=lambda _: self._explain_missing(name)):
            self._jobs.patch_namespaced_custom_object(*self._path(), name, body, _request_timeout=TIMEOUT)

    def delete_job(self, name: str, uid: str, *, pods_first: bool) -> None:
        """Delete exactly the job of this UID; with `pods_first` it stays, as Cancelling, until its pods have ended."""
        policy = "Foreground" if pods_first else "Background"
        body = {"propagationPolicy": policy, "preconditions": {"uid": uid}}
        with self.explained("delete", RESOURCE, self.namespace):
            self._jobs.delete_namespaced_custom_object(*self._path(), name, body=body, _request_timeout=TIMEOUT)

    def has_job(self, name: str, uid: str) -> bool:
        """Tell whether the job of this UID is still there."""
        try:
            return bool(self.get_job(name)["metadata"]["uid"] == uid)
        except ClientError as error:
            if error.code is Exit.NOT_FOUND:
                return False
            raise

    def _explain_missing(self, name: str) -> ClientError:
        # 404 is also the answer of a cluster that does not know the resource: the list tells them apart.
        try:
            others = [str(job["metadata"]["name"]) for job in self.list_jobs(self.namespace)]
        except ClientError as error:
            if error.code is Exit.NO_CRD:
                return error
            others = []
        return no_job(clean(name, 253), self.namespace, map(clean, others))

    def _explain_missing_place(self, error: ApiException) -> ClientError:
        if "namespaces" in str(error.body):
            message = f"there is no namespace {self.namespace}: name another with -n, or ask for it to be made"
            return ClientError(message, Exit.NOT_FOUND)
        return no_crd()

    def _path(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.namespace, PLURAL


class _Noticed(logging.Handler):
    """Keeps what the client's loader logs about an exec plugin: it goes on without a login instead of raising."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of a record."""
        self.said.append(clean(record.getMessage(), 300))


@contextmanager
def _noticed_plugin_errors() -> Iterator[list[str]]:
    handler, root = _Noticed(), logging.getLogger()
    others, root.handlers = root.handlers, [handler]
    try:
        yield handler.said
    finally:
        root.handlers = others


def _load(kubeconfig: str | None, context: str | None) -> tuple[Any, str]:
    settings: Any = client.Configuration()
    load: Any = config
    if kubeconfig is None and context is None and not _has_kubeconfig() and _IN_POD in os.environ:
        load.load_incluster_config(client_configuration=settings)
        return settings, _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.exists() else "default"

    # The client reads the variable once, when it is imported; a notebook may set it later.
    kubeconfig = kubeconfig or os.environ.get("KUBECONFIG")
    load.load_kube_config(kubeconfig, context=context, client_configuration=settings, persist_config=False)
    contexts, active = load.list_kube_config_contexts(kubeconfig)
    chosen = next((each for each in contexts if each["name"] == context), active)
    return settings, str(chosen["context"].get("namespace") or "default")


def is_configured() -> bool:
    """Tell whether there is a cluster to ask without any option: a kubeconfig, or this is a pod."""
    return _has_kubeconfig() or _IN_POD in os.environ


def _has_kubeconfig() -> bool:
    places = os.environ.get("KUBECONFIG", "~/.kube/config").split(os.pathsep)
    return any(Path(place).expanduser().is_file() for place in places if place)


def context_names(kubeconfig: str | None) -> list[str]:
    """Return the names of a kubeconfig's contexts; none if it cannot be read."""
    load: Any = config
    try:
        contexts, _ = load.list_kube_config_contexts(kubeconfig)
    except (ConfigException, OSError, ValueError, TypeError):
        return []
    return [str(each["name"]) for each in contexts]


def _explain_config(error: Exception, context: str | None) -> str:
    said = clean(error, 300)
    if context and "context" in said.lower():
        return f"the kubeconfig has no context {clean(context, 253)}: `kubectl config get-contexts` lists them"
    return f"no cluster is configured: set KUBECONFIG, or name a file with --kubeconfig ({said})"
