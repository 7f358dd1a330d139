"""Checks that trainers can reach the progress server: the operator asks it for a page, under the URL that they use.

While it does not answer, silence says nothing about a trainer (decide/silence.py).
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import aiohttp

from finetune_operator.reports.certificate import trust_authority

CHECK_SECONDS = 15.0
TIMEOUT = aiohttp.ClientTimeout(total=5)

logger = logging.getLogger(__name__)


async def check_reachability(progress_url: str, tls_dir: Path, on_outage: Callable[[], None]) -> None:
    """Ask until cancelled; `on_outage` is called after every request without an answer. Any answer will do."""
    tls = trust_authority(tls_dir)
    is_reached = True

    async with aiohttp.ClientSession(timeout=TIMEOUT, trust_env=False) as session:
        while True:
            try:
                async with session.get(progress_url, ssl=tls, allow_redirects=False):
                    is_reached = True
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                on_outage()
                if is_reached:
                    found = f"{type(error).__name__}: {error}"
                    logger.warning("the progress server is not reached under %s: %s", progress_url, found)
                is_reached = False
            await asyncio.sleep(CHECK_SECONDS)
