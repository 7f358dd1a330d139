"""Download of one S3 object: ranges in parallel, each retried on its own, all of the same version of the object."""

from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune_trainer.storage.object_store import OnBytes
from finetune_trainer.storage.s3_session import S3Session
from finetune_trainer.storage.s3_upload import DEFAULT_PLAN, PartPlan, collect, fetch_range


@dataclass(frozen=True)
class S3Downloader:
    """Downloads objects on the threads of `parts`."""

    session: S3Session
    parts: Executor
    plan: PartPlan = DEFAULT_PLAN

    def download(self, key: str, target: Path, on_bytes: OnBytes) -> int:
        """Writes an object to a file, whose folder is created, and returns its size in bytes.

        Raises S3Fault, also if the object changes during the download, and OSError for the disk.
        """
        head = self.session.call("head_object", key)
        size, etag = int(head["ContentLength"]), str(head["ETag"])
        target.parent.mkdir(parents=True, exist_ok=True)
        step = self.plan.part_bytes(size)

        with target.open("wb") as file:
            file.truncate(size)  # ranges arrive in any order

        def fetch(start: int) -> None:
            data = fetch_range(self.session, key, start, min(start + step, size), etag)
            # Opened for each range: a range that is left alone after a signal has no part in a file closed meanwhile.
            with target.open("r+b") as file:
                file.seek(start)
                file.write(data)
            on_bytes(len(data))

        collect(self.parts, [partial(fetch, start) for start in range(0, size, step)])
        return size
