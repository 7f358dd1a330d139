"""What looks like a secret is masked, in every shape that our libraries write it; what does not is left alone."""

import time

import pytest

from finetune_api.logs.redaction import MASK, redact

CANARY = "c4n4ryS3cretValue0123456789abcdef"
SECRETS = {
    "a bearer token": f"headers: {{'Authorization': 'Bearer {CANARY}'}}",
    "a basic header": f"Authorization: Basic {CANARY}==",
    "a signature of AWS": f"Authorization: AWS4-HMAC-SHA256 Credential=AKIA/20261127, Signature={CANARY}",
    "a presigned URL": f"GET https://s3/b/k?X-Amz-Expires=60&X-Amz-Signature={CANARY}&x=1",
    "a session token in a query": f"https://s3/b?X-Amz-Security-Token={CANARY}",
    "user and password of a URL": f"cannot reach http://proxy-user:{CANARY}@proxy:3128",
    "an environment variable": f"AWS_SECRET_ACCESS_KEY={CANARY}",
    "a variable of JSON": f'{{"secretAccessKey": "{CANARY}", "x": 1}}',
    "a password of YAML": f"password: {CANARY}",
    "a token of Hugging Face": f"invalid token hf_{CANARY}",
    "a service account's token": f"eyJhbGciOiJSUzI1NiIs.{CANARY}.{CANARY}",
    "a key of GitHub": f"ghp_{CANARY}",
    "a private key": f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}\n-----END RSA PRIVATE KEY-----",
    "a private key that is cut off": f"-----BEGIN PRIVATE KEY-----\n{CANARY}",
}
HARMLESS = (
    "team/bot: created Job bot-1a2b3",
    "step 120 of 1,000: loss 1.2345, 17,512 tokens/s",
    "https://s3.example.com:9000/results/team/bot/manifest.json",
    "sha256 9abbcb1cc531545b7aa15e33d2dd467e22f67f617c76e28bdd70d4e98b293fd1",
    "the tokenizer has no pad token: eos is used",
    "trained_tokens=123456 of the epoch",
    "pad_token=<|endoftext|>",
    "a bearer token is required",
    "Basic configuration of the model",
    "key: results/team/bot/manifest.json",
    "dataset.source names no secretName",
    "the Secret hub-token does not exist: create it with the key HF_TOKEN",
)


@pytest.mark.parametrize("line", SECRETS.values(), ids=SECRETS)
def test_a_secret_is_masked(line: str) -> None:
    masked = redact(line)
    assert CANARY not in masked
    assert MASK in masked


def test_the_names_beside_a_secret_stay() -> None:
    assert redact("http://user:secret@proxy:3128/path") == "http://***@proxy:3128/path"
    assert redact("a=1&X-Amz-Signature=0123456789&b=2") == "a=1&X-Amz-Signature=***&b=2"


@pytest.mark.parametrize("line", HARMLESS)
def test_other_lines_are_left_alone(line: str) -> None:
    assert redact(line) == line


@pytest.mark.parametrize("line", ["a" * 200_000, "a-" * 100_000, "secret_" * 30_000, "x://" + "a:" * 50_000])
def test_a_long_line_costs_no_time(line: str) -> None:
    begun = time.monotonic()
    redact(line)
    assert time.monotonic() - begun < 2
