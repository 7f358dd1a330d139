"""Inputs of a job on the dev cluster, put into its S3: a tiny model with random weights and real conversations."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from finetune_test_models import chat_data
from finetune_test_models.tiny_model import make_tiny_model
from finetune_test_servers.s3_server import S3Server

BUCKET = "models"


def put_inputs(store: S3Server, work: Path, *, rows: int) -> None:
    """Create the bucket and fill it with tiny-llama/ and data/chat.jsonl (the first `rows` conversations)."""
    store.create_bucket(BUCKET)
    texts = [message["content"] for messages in islice(chat_data.conversations(), rows) for message in messages]
    base = make_tiny_model(work / "base", texts=texts)
    for path in base.iterdir():
        store.client().upload_file(str(path), BUCKET, f"tiny-llama/{path.name}")
    put_text(store, "data/chat.jsonl", chat_data.write_jsonl(work / "chat.jsonl", rows).read_text(encoding="utf-8"))


def put_text(store: S3Server, key: str, text: str) -> None:
    """Write one object."""
    store.client().put_object(Bucket=BUCKET, Key=key, Body=text.encode())


def read_json(store: S3Server, uri: str) -> dict[str, Any]:
    """Read one JSON object by its s3:// address."""
    body = store.client().get_object(Bucket=BUCKET, Key=uri.removeprefix(f"s3://{BUCKET}/"))["Body"].read()
    document: dict[str, Any] = json.loads(body)
    return document


def keys_below(store: S3Server, prefix: str) -> list[str]:
    """Keys of the bucket that start with `prefix`."""
    return [entry["Key"] for entry in store.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]
