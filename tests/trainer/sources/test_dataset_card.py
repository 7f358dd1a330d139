"""What a dataset's card says about its files, hostile cards among them."""

from pathlib import Path

import pytest

from finetune_api.failures import FailureReason
from finetune_test_servers.hub import Hub, HubRepo
from finetune_trainer.errors import TrainerError
from finetune_trainer.sources import SourceAccess, fetch_dataset
from finetune_trainer.sources.dataset_card import choose_from_card
from finetune_trainer.storage.object_store import ignore_bytes
from finetune_trainer.storage.retry import RetryPolicy

NAMES = [
    "README.md",
    "main/train-00000-of-00002.parquet",
    "main/train-00001-of-00002.parquet",
    "main/test-00000-of-00001.parquet",
    "extra/deep/train.jsonl.gz",
    "other.csv",
]


def card(configs: str) -> str:
    return f"---\nlicense: mit\nconfigs:\n{configs}\n---\n# Text\n---\nconfigs: [x]\n---\n"


BOTH = """- config_name: main
  default: true
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: extra
  data_files: extra/**/*.jsonl.gz"""
CHOICES = {
    "the default subset": (BOTH, "train", None, [1, 2]),
    "another split": (BOTH, "test", None, [3]),
    "a named subset": (BOTH, "train", "extra", [4]),
    "a list of patterns": ("- config_name: a\n  data_files: [other.csv, ./extra/*/train*]", "train", None, [4, 5]),
    "splits as keys": (
        "- config_name: a\n  data_files: {train: other.csv, test: ['main/test-?????-*']}",
        "test",
        None,
        [3],
    ),
    "a folder": ("- config_name: a\n  data_dir: main", "train", None, [1, 2, 3]),
    "a folder with patterns": (
        "- config_name: a\n  data_dir: main\n  data_files: [{split: train, path: 'train*'}]",
        *("train", None, [1, 2]),
    ),
    "a star stays in its folder": ("- config_name: a\n  data_files: '*.csv'", "train", None, [5]),
    "two stars do not": ("- config_name: a\n  data_files: '**'", "train", None, [0, 1, 2, 3, 4, 5]),
}


@pytest.mark.parametrize(("configs", "split", "subset", "expected"), CHOICES.values(), ids=CHOICES)
def test_the_card_says_which_files(configs: str, split: str, subset: str | None, expected: list[int]) -> None:
    chosen = choose_from_card("hf://a/b", card(configs), NAMES, split, subset)
    assert chosen == [NAMES[index] for index in expected]


NOTHING = {
    "no block": "# A dataset",
    "no configs": "---\nlicense: mit\n---\n",
    "configs that are no list": "---\nconfigs: 7\n---\n",
    "configs without names": "---\nconfigs: [1, {}, {config_name: 3}]\n---\n",
    "a block without end": "---\nconfigs:\n- config_name: a\n",
    "a block that is too long": f"---\n# {'x' * 2**20}\nconfigs: [{{config_name: a}}]\n---\n",
}


@pytest.mark.parametrize("text", NOTHING.values(), ids=NOTHING)
def test_a_card_that_says_nothing_leaves_the_usual_names(text: str) -> None:
    assert choose_from_card("hf://a/b", text, NAMES, "train", None) is None


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\n" + "".join(
    f"{chr(99 + i)}: &{chr(99 + i)} [*{chr(98 + i)}, *{chr(98 + i)}]\n" for i in range(20)
)
REFUSED = {
    "several subsets": (
        card("- config_name: a\n- config_name: b"),
        None,
        "several subsets, none of which is the default.*a, b",
    ),
    "an unknown subset": (card(BOTH), "c", "no subset c: set spec.dataset.subset to one of main, extra"),
    "an unknown split": (
        card("- config_name: a\n  data_files: {test: x}"),
        None,
        "no split train; its README.md lists test",
    ),
    "no YAML": ("---\nconfigs: [\n---\n", None, "not valid YAML"),
    "an object": ("---\nconfigs: !!python/object/apply:os.system [exit]\n---\n", None, "not valid YAML"),
    "deep brackets": (f"---\nconfigs: {'[' * 50_000}\n---\n", None, "not valid YAML"),
}


@pytest.mark.parametrize(("text", "subset", "pattern"), REFUSED.values(), ids=REFUSED)
def test_what_the_card_cannot_mean_is_refused(text: str, subset: str | None, pattern: str) -> None:
    with pytest.raises(TrainerError, match=pattern) as refusal:
        choose_from_card("hf://a/b", text, NAMES, "train", subset)
    assert refusal.value.reason is FailureReason.DATASET_NOT_FOUND


def test_paths_that_leave_the_repository_choose_nothing() -> None:
    climbing = card("- config_name: a\n  data_files: ['../../etc/passwd', /etc/passwd]")
    assert choose_from_card("hf://a/b", climbing, NAMES, "train", None) == []


def test_references_that_multiply_take_no_memory() -> None:
    assert choose_from_card("hf://a/b", f"---\n{LAUGHS}configs: *v\n---\n", NAMES, "train", None) is None


def test_a_subset_of_a_repository_is_fetched(hub: Hub, tmp_path: Path) -> None:
    rows = b'{"text": "a"}\n'
    files = {"en/train.jsonl": rows, "de/train.jsonl": rows, "de/test.jsonl": rows}
    hub.repos["datasets/acme/bare"] = HubRepo(files)
    listed = card("- config_name: de\n  data_files: de/train.jsonl\n- config_name: en\n  data_files: en/*")
    hub.repos["datasets/acme/described"] = HubRepo(files | {"README.md": listed.encode()})
    access = SourceAccess(hub_endpoint=hub.url, hub_retries=RetryPolicy(outage_seconds=0))
    for name in ("bare", "described"):
        found = fetch_dataset(f"hf://acme/{name}", "train", tmp_path / name, access, ignore_bytes, "de")
        assert [path.relative_to(found.folder).as_posix() for path in found.files] == ["de/train.jsonl"]
    with pytest.raises(TrainerError, match="no subset fr"):
        fetch_dataset("hf://acme/bare", "train", tmp_path / "no", access, ignore_bytes, "fr")
