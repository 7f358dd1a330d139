"""Jobs from Python, as in a notebook: submit, follow, wait. Everything that fails is a ClientError, whose message is a
sentence that says what to do."""

import logging
import time
from collections.abc import Iterator
from typing import Self

from finetune_api import API_VERSION, KIND
from finetune_api.base import Json
from finetune_client.connection import Cluster
from finetune_client.errors import ClientError, Exit
from finetune_client.rows import ENDED, Row
from finetune_client.terminal.text import find, word

log = logging.getLogger(__name__)


class Job:
    """One job of a cluster: exactly the one that was submitted or found, not a later one of its name."""

    def __init__(self, cluster: Cluster, job: Json) -> None:
        self._cluster = cluster
        self.name = str(job["metadata"]["name"])
        self.namespace = str(job["metadata"]["namespace"])
        self.uid = str(job["metadata"]["uid"])

    def __repr__(self) -> str:
        return f"Job({self.namespace}/{self.name})"

    def read(self) -> Json:
        """Get the whole object, as `kubectl get -o json` prints it. Raises ClientError, also for a replaced job."""
        job = self._cluster.get_job(self.name)
        if job["metadata"]["uid"] != self.uid:
            message = f"job {self.name} was deleted, and another one has its name now: get that one with jobs.get"
            raise ClientError(message, Exit.NOT_FOUND)
        return job

    @property
    def row(self) -> Row:
        """Phase, reason, step, loss and time left, as of now."""
        return Row.of(self.read())

    def follow(self, interval: float = 2.0) -> Iterator[Row]:
        """Yield the row whenever something in it has changed; the last one is that of the job's end.

        `interval`: seconds between two looks. A cluster that does not answer is logged once and asked again.
        """
        shown: Row | None = None
        is_away = False
        while shown is None or shown.phase not in ENDED:
            if shown is not None or is_away:
                time.sleep(interval)

            try:
                row = self.row
            except ClientError as error:
                if error.code is not Exit.NO_CLUSTER:
                    raise
                if not is_away:
                    log.warning("%s; asking again", error.message)
                is_away = True
                continue

            is_away = False
            if shown is None or row.without_age() != shown.without_age():
                shown = row
                yield row

    def wait(self, interval: float = 10.0) -> list[Json]:
        """Wait for the job's end, and return its artifacts: type, uri, bytes, sha256, and quantization of GGUF files.

        Raises ClientError (code JOB_FAILED) with the reason, the message and what to do if the job fails.
        """
        for _ in self.follow(interval):
            pass

        job = self.read()
        row = Row.of(job)
        if row.phase == "Failed":
            hint = word(job, "status", "failure", "hint")
            message = f"job {self.name} failed with {row.reason}: {row.message}"
            raise ClientError(f"{message}; {hint}" if hint else message, Exit.JOB_FAILED)
        return [each for each in find(job, "status", "artifacts") or () if isinstance(each, dict)]

    def suspend(self) -> None:
        """Stop the job with a checkpoint of what it has trained, and keep it."""
        self._set_suspended(True)

    def resume(self) -> None:
        """Let a suspended job go on from its checkpoint."""
        self._set_suspended(False)

    def cancel(self) -> None:
        """Delete the job with its pods. What lies in S3 stays, checkpoints too."""
        self._cluster.delete_job(self.name, self.uid, pods_first=True)

    def _set_suspended(self, suspended: bool) -> None:
        if (row := self.row).phase in ENDED:
            raise ClientError(f"job {self.name} has ended ({row.phase}): it cannot be suspended or resumed")
        self._cluster.patch_job(self.name, {"spec": {"runPolicy": {"suspend": suspended}}})


class Jobs:
    """The jobs of one namespace, with the rights of a kubeconfig or, in a pod, of its ServiceAccount."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    @classmethod
    def open(cls, *, kubeconfig: str | None = None, context: str | None = None, namespace: str | None = None) -> Self:
        """Open a cluster. What is left out is that of kubectl. Raises ClientError."""
        return cls(Cluster.open(kubeconfig, context, namespace))

    def submit(self, name: str, spec: Json) -> Job:
        """Create a job; `spec` is that of a manifest. Raises ClientError with every field that is wrong."""
        manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": spec}
        return Job(self._cluster, self._cluster.create_job(manifest))

    def get(self, name: str) -> Job:
        """Get a job. Raises ClientError with the nearest names if there is none."""
        return Job(self._cluster, self._cluster.get_job(name))

    def list(self) -> list[Row]:
        """List the namespace's jobs, by name."""
        return sorted(
            (Row.of(job) for job in self._cluster.list_jobs(self._cluster.namespace)), key=lambda row: row.name
        )
