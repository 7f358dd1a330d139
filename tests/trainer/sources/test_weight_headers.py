"""Headers of weight files, read where they lie: in a folder, on a hub and in a bucket, without the weights."""

import json
from pathlib import Path

import pytest

from finetune_test_servers.hub import COMMIT, OLD_COMMIT, TOKEN, Hub, HubRepo
from finetune_test_servers.s3_server import S3Server
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.safetensors_header import FIRST_BYTES, TensorHeader
from finetune_trainer.sources import SourceAccess, fetch_weight_headers
from finetune_trainer.storage.retry import RetryPolicy

SIZE = 1 << 20
"""Bytes of the weights in each file, far more than their header takes."""
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def weights(name: str) -> bytes:
    header = json.dumps({name: {"dtype": "BF16", "shape": [512, 1024], "data_offsets": [0, SIZE]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(SIZE)


INDEX = {"weight_map": {"a.weight": FIRST, "b.weight": SECOND}}
MODEL = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    FIRST: weights("a.weight"),
    SECOND: weights("b.weight"),
}


def check(found: list[TensorHeader]) -> None:
    described = [(tensor.name, tensor.dtype, tensor.shape, tensor.file) for tensor in found]
    assert described == [
        ("a.weight", "BF16", (512, 1024), FIRST),
        ("b.weight", "BF16", (512, 1024), SECOND),
    ]
    assert all(tensor.end - tensor.start == SIZE for tensor in found)


def test_of_a_folder(tmp_path: Path) -> None:
    for name, content in MODEL.items():
        (tmp_path / name).write_bytes(content)
    check(fetch_weight_headers(f"file://{tmp_path}", None, SourceAccess()))


def test_a_link_out_of_a_claim_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(weights("a.weight"))
    claim = tmp_path / "claim"
    claim.mkdir()
    (claim / "config.json").touch()
    (claim / "model.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(TrainerError, match="leads out of the claim"):
        fetch_weight_headers("pvc://models/", None, SourceAccess(mount=claim))


@pytest.fixture
def access(hub: Hub) -> SourceAccess:
    return SourceAccess(hub_endpoint=hub.url, hub_retries=RetryPolicy(outage_seconds=3, first_wait=0.05))


@pytest.fixture
def s3_access(s3_server: S3Server, tmp_path: Path) -> SourceAccess:
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text(s3_server.access_key)
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text(s3_server.secret_key)
    return SourceAccess(tmp_path, s3_server.endpoint_url)


def put(server: S3Server, bucket: str, files: dict[str, bytes]) -> None:
    server.create_bucket(bucket)
    for name, content in files.items():
        server.client().put_object(Bucket=bucket, Key=f"base/{name}", Body=content)


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_of_a_hub_by_ranges(hub: Hub, access: SourceAccess, ignores_ranges: bool) -> None:
    hub.repos["models/acme/tiny"] = HubRepo(MODEL, ignores_ranges=ignores_ranges)
    check(fetch_weight_headers("hf://acme/tiny", None, access))
    assert all(last - first < SIZE for first, last in hub.ranges)
    assert len(hub.ranges) == (0 if ignores_ranges else 3)


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_long_header_is_read_in_two_parts(hub: Hub, access: SourceAccess, ignores_ranges: bool) -> None:
    count = 3000
    tensors = {f"{n}.weight": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n in range(count)}
    header = json.dumps(tensors).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(count)
    assert len(header) > FIRST_BYTES
    files = {"config.json": b"{}", "model.safetensors": content}
    hub.repos["models/acme/tiny"] = HubRepo(files, ignores_ranges=ignores_ranges)
    assert len(fetch_weight_headers("hf://acme/tiny", None, access)) == count


def test_of_the_commit_that_is_asked_for_with_the_token(hub: Hub, access: SourceAccess, tmp_path: Path) -> None:
    hub.repos["models/acme/tiny"] = HubRepo(MODEL, gated=True)
    (tmp_path / "HF_TOKEN").write_text(TOKEN)
    secret = SourceAccess(tmp_path, hub_endpoint=access.hub_endpoint, hub_retries=access.hub_retries)
    check(fetch_weight_headers("hf://acme/tiny", OLD_COMMIT, secret))
    asked = [path for path in hub.requests if "/resolve/" in path]
    assert len(asked) == 3
    assert all(f"/resolve/{OLD_COMMIT}/" in path for path in asked)
    assert COMMIT != OLD_COMMIT


def test_a_hub_that_hesitates_is_asked_again(hub: Hub, access: SourceAccess) -> None:
    hub.repos["models/acme/tiny"] = HubRepo(MODEL)
    hub.failures = [503, 502]
    check(fetch_weight_headers("hf://acme/tiny", None, access))


@pytest.mark.parametrize("status", [403, 500])
def test_a_refusal_is_in_our_words(hub: Hub, status: int) -> None:
    hub.repos["models/acme/tiny"] = HubRepo(MODEL, refused={FIRST: status})
    once = SourceAccess(hub_endpoint=hub.url, hub_retries=RetryPolicy(outage_seconds=0))
    with pytest.raises(TrainerError) as refusal:
        fetch_weight_headers("hf://acme/tiny", None, once)
    assert refusal.value.reason == ("ModelAccessDenied" if status == 403 else "HubUnavailable")
    assert "canary" not in refusal.value.message


def test_a_shard_that_broke_off_on_the_hub(hub: Hub, access: SourceAccess) -> None:
    hub.repos["models/acme/tiny"] = HubRepo({**MODEL, SECOND: MODEL[SECOND][: SIZE // 2]})
    with pytest.raises(TrainerError, match=f"{SECOND} broke off"):
        fetch_weight_headers("hf://acme/tiny", None, access)


EMPTY = {
    "an empty shard": (SECOND, f"{SECOND} is not a safetensors file"),
    "an empty index": ("model.safetensors.index.json", "is not valid JSON"),
}


@pytest.mark.parametrize(("name", "reason"), EMPTY.values(), ids=EMPTY)
def test_an_empty_file_is_named_wherever_it_lies(
    hub: Hub, access: SourceAccess, s3_server: S3Server, s3_access: SourceAccess, name: str, reason: str
) -> None:
    files = {**MODEL, name: b""}
    hub.repos["models/acme/tiny"] = HubRepo(files)
    bucket = f"empty-{len(name)}"
    put(s3_server, bucket, files)
    for source, how in (("hf://acme/tiny", access), (f"s3://{bucket}/base", s3_access)):
        with pytest.raises(TrainerError, match=reason):
            fetch_weight_headers(source, None, how)


def test_of_a_bucket_by_ranges(s3_server: S3Server, s3_access: SourceAccess) -> None:
    put(s3_server, "headers", MODEL)
    check(fetch_weight_headers("s3://headers/base", None, s3_access))
