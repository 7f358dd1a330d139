"""Posts the progress of the run to the operator, over HTTPS.

A thread posts the newest state; a report that cannot be delivered is replaced by the next one. So an absent operator
costs the training nothing, and is up to date with the first report after its return. Reports share a connection for as
long as the operator keeps it: TLS costs both sides more than the report.
"""

import logging
import random
import ssl
import threading
import time
from pathlib import Path

import urllib3

from finetune_api.run_config import ProgressTarget
from finetune_trainer.job.progress_tracker import ProgressTracker

log = logging.getLogger(__name__)
POST_TIMEOUT_SECONDS = 10
MAX_WAIT_SECONDS = 30.0
JOB_HAS_ENDED = 410  # HTTP Gone: no report of this pod is wanted any more
_ONCE_MORE = urllib3.Retry(
    connect=0, read=1, redirect=0, status=0, other=0, allowed_methods=None, respect_retry_after_header=False
)
"""A kept connection may have been closed by the operator in the moment of a report: it is sent on a new one."""


class Reporter:
    """Thread that posts the newest state to the operator."""

    def __init__(
        self, progress: ProgressTracker, target: ProgressTarget, token: Path, heartbeat: float | None = None
    ) -> None:
        """`token` is the file of a projected token: it is read for every report, because the kubelet replaces it.

        `heartbeat`: seconds after which a report is due even if nothing changed: silence means that the process hangs.
        """
        if not target.url.startswith("https://"):
            raise ValueError("progress is reported over https only: the report carries a token")

        # No proxies: those of the environment lead out of the cluster, and the operator is in it.
        tls = ssl.create_default_context(cadata=target.ca_certificate)
        self._connections = urllib3.PoolManager(num_pools=1, maxsize=1, ssl_context=tls, retries=_ONCE_MORE)

        self._progress = progress
        self._target = target
        self._token = token
        self._heartbeat = heartbeat
        self._wake = threading.Event()
        self._changed = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        progress.listen(self._notice)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self, timeout: float = 3.0) -> None:
        """Posts the last state if that works within `timeout` seconds; the outcome does not depend on it."""
        self._closing, self._changed = True, True  # the last state is posted even if nothing changed

        self._wake.set()
        self._thread.join(timeout)

    @property
    def _interval(self) -> float:
        """Seconds between two looks; a short heartbeat needs them more often."""
        return min(self._target.interval_seconds, (self._heartbeat or self._target.interval_seconds) / 4)

    def _notice(self, stage_changed: bool) -> None:
        self._changed = True
        if stage_changed:
            self._wake.set()

    def _run(self) -> None:
        """Posts after every interval in which something changed, and at once after a change of stage."""
        wait, posted = self._interval, time.monotonic()
        while True:
            # Pods must not report in step with each other.
            self._wake.wait(wait * random.uniform(0.8, 1.2))  # noqa: S311
            self._wake.clear()
            last = self._closing

            # A little early: the wait before the next look has to fit in as well.
            is_due = self._heartbeat is not None and time.monotonic() - posted > 0.75 * self._heartbeat
            if self._changed or is_due:
                # Cleared before the post: a change during it is for the next report.
                self._changed = False
                status = self._post()
                if status == JOB_HAS_ENDED:
                    return
                delivered = status is not None and 200 <= status < 300
                self._changed = self._changed or not delivered
                posted = time.monotonic() if delivered else posted
                # An absent operator is asked less and less often.
                wait = self._interval if delivered else min(MAX_WAIT_SECONDS, wait * 2)

            if last:
                return

    def _post(self) -> int | None:
        """Posts the state; returns the HTTP status of the answer, or None if there was none."""
        body = self._progress.report().model_dump_json(by_alias=True, exclude_none=True).encode()

        try:
            headers = {"Authorization": f"Bearer {self._token.read_text().strip()}", "Content-Type": "application/json"}
            # Following a redirect would carry the bearer token to another address.
            answer = self._connections.request(
                "POST", self._target.url, body=body, headers=headers, timeout=POST_TIMEOUT_SECONDS, redirect=False
            )
        except (OSError, urllib3.exceptions.HTTPError) as error:
            log.info("progress report not delivered: %s", type(error).__name__)
            return None

        if answer.status >= 300:
            log.info("progress report refused: HTTP %d", answer.status)
        return answer.status
