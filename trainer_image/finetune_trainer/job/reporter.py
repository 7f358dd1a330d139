"""Tell the operator, over HTTPS, what the run is doing.

A thread posts the newest state; a report that cannot be delivered is replaced by the next one. So an operator that is
away costs the training nothing, and is caught up with at once when it returns.
"""

import http.client
import logging
import random
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from finetune_api.run_config import ProgressTarget
from finetune_trainer.job.progress_tracker import ProgressTracker

log = logging.getLogger(__name__)
POST_TIMEOUT_SECONDS = 10
MAX_WAIT_SECONDS = 30.0
NEVER_AGAIN = 410  # the job has ended, whatever this pod still has to say


class _RefuseRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the bearer token to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Reporter:
    """Posts the newest state to the operator, on a thread of its own."""

    def __init__(self, progress: ProgressTracker, target: ProgressTarget, token: Path) -> None:
        """`token` is the file of a projected token: it is read for every report, because the kubelet replaces it."""
        if not target.url.startswith("https://"):
            raise ValueError("progress is reported over https only: the report carries a token")
        tls = ssl.create_default_context(cadata=target.ca_certificate)
        # The environment's proxies are for the outside; the operator is in the cluster.
        handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls), _RefuseRedirects())
        self._opener = urllib.request.build_opener(*handlers)
        self._progress = progress
        self._target = target
        self._token = token
        self._wake = threading.Event()
        self._changed = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        progress.listen(self._notice)

    def start(self) -> None:
        """Begin to report."""
        self._thread.start()

    def close(self, timeout: float = 3.0) -> None:
        """Send the last state if that works within `timeout` seconds; the outcome does not depend on it."""
        self._closing, self._changed = True, True
        self._wake.set()
        self._thread.join(timeout)

    def _notice(self, stage_changed: bool) -> None:
        self._changed = True
        if stage_changed:
            self._wake.set()

    def _run(self) -> None:
        wait = self._target.interval_seconds
        while True:
            self._wake.wait(wait * random.uniform(0.8, 1.2))  # noqa: S311 (pods must not report in step)
            self._wake.clear()
            last = self._closing
            if self._changed:
                self._changed = False
                status = self._post()
                if status == NEVER_AGAIN:
                    return
                delivered = status is not None and 200 <= status < 300
                self._changed = self._changed or not delivered
                wait = self._target.interval_seconds if delivered else min(MAX_WAIT_SECONDS, wait * 2)
            if last:
                return

    def _post(self) -> int | None:
        """HTTP status of the answer, or None where there was none."""
        body = self._progress.report().model_dump_json(by_alias=True, exclude_none=True).encode()
        try:
            headers = {"Authorization": f"Bearer {self._token.read_text().strip()}", "Content-Type": "application/json"}
            request = urllib.request.Request(self._target.url, data=body, headers=headers, method="POST")  # noqa: S310
            with self._opener.open(request, timeout=POST_TIMEOUT_SECONDS) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as refusal:
            log.info("progress report refused: HTTP %d", refusal.code)
            refusal.close()
            return refusal.code
        except (OSError, http.client.HTTPException) as error:
            log.info("progress report not delivered: %s", type(error).__name__)
            return None
