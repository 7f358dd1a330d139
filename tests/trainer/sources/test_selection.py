"""Which files of a source are used."""

import pytest

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.sources.selection import choose_adapter_files, choose_data_files, choose_model_files

BASE = ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_of_a_model_weights_configuration_and_tokenizer_are_used() -> None:
    others = ["README.md", "model.py", "pytorch_model.bin", "training_args.bin", ".gitattributes", "model.gguf"]
    copies = ["consolidated.safetensors", "original/consolidated.00.pth", "onnx/model.safetensors", "onnx/config.json"]
    tokenizer = ["tokenizer.model", "merges.txt", "chat_template.jinja", "generation_config.json"]
    assert choose_model_files("s3://b/m/", [*BASE, *others, *copies, *tokenizer]) == sorted([*BASE, *tokenizer])


NO_MODELS = {
    "nothing": ([], FailureReason.MODEL_NOT_FOUND),
    "an adapter": (["adapter_config.json", "adapter_model.safetensors"], FailureReason.MODEL_NOT_FOUND),
    "GGUF only": (["config.json", "model.gguf"], FailureReason.MODEL_NOT_FOUND),
    "pickled weights only": (["config.json", "pytorch_model-00001-of-00001.bin"], FailureReason.UNSAFE_MODEL),
    "weights in a folder below": (["config.json", "unet/model.safetensors"], FailureReason.MODEL_NOT_FOUND),
}


@pytest.mark.parametrize(("names", "reason"), NO_MODELS.values(), ids=NO_MODELS)
def test_what_is_no_model_is_refused(names: list[str], reason: FailureReason) -> None:
    with pytest.raises(TrainerError, match="s3://b/m/") as refusal:
        choose_model_files("s3://b/m/", names)
    assert refusal.value.reason is reason


def test_of_an_adapter_weights_configuration_and_tokenizer_are_used() -> None:
    used = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "merges.txt", "tokenizer.json"]
    others = [
        "README.md",
        "training_args.bin",
        "optimizer.pt",
        "checkpoint-5/adapter_model.safetensors",
        "x.safetensors",
    ]
    assert choose_adapter_files("hf://a/b", [*others, *used]) == used


NO_ADAPTERS = {
    "a model": (BASE, FailureReason.MODEL_NOT_FOUND),
    "weights without configuration": (["adapter_model.safetensors"], FailureReason.MODEL_NOT_FOUND),
    "pickled weights only": (["adapter_config.json", "adapter_model.bin"], FailureReason.UNSAFE_MODEL),
}


@pytest.mark.parametrize(("names", "reason"), NO_ADAPTERS.values(), ids=NO_ADAPTERS)
def test_what_is_no_adapter_is_refused(names: list[str], reason: FailureReason) -> None:
    with pytest.raises(TrainerError, match="hf://a/b") as refusal:
        choose_adapter_files("hf://a/b", names)
    assert refusal.value.reason is reason


SPLITS = {
    "shards": (["data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"], "train", [0]),
    "a folder": (["train/a.jsonl", "test/a.jsonl"], "test", [1]),
    "a file": (["train.csv", "validation.csv"], "validation", [1]),
    "a name with an underscore": (
        ["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"],
        "train_sft",
        [0],
    ),
    "no split named at all": (["chat.jsonl", "more.jsonl"], "train", [0, 1]),
    "a name that only contains the split's": (["constrained.jsonl", "test.jsonl"], "train", [0]),
    "test is not train": (["latest.jsonl", "test.jsonl"], "test", [1]),
    "a source without splits": (["train.jsonl", "test.jsonl"], None, [1, 0]),
    "descriptions and code": (["dataset_infos.json", "load.py", ".cache/x.json", "a.json"], "train", [3]),
}


@pytest.mark.parametrize(("names", "split", "expected"), SPLITS.values(), ids=SPLITS)
def test_of_a_dataset_the_splits_files_are_used(names: list[str], split: str | None, expected: list[int]) -> None:
    assert choose_data_files("hf://a/b", names, split) == [names[index] for index in expected]


@pytest.mark.parametrize(("names", "split"), [([], None), (["a.txt"], None), (["train.jsonl"], "test")])
def test_a_dataset_without_files_says_what_was_looked_for(names: list[str], split: str | None) -> None:
    with pytest.raises(TrainerError, match=r"hf://a/b has 0 data files \(\.jsonl, ") as refusal:
        choose_data_files("hf://a/b", names, split)
    assert refusal.value.reason is FailureReason.DATASET_NOT_FOUND
