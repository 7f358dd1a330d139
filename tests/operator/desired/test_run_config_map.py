"""The ConfigMap that hands the run's configuration over: it never changes, and its name says what it holds."""

import copy
from dataclasses import replace
from unittest.mock import Mock

import pytest
import yaml

from finetune_api.base import Json
from finetune_api.cost.prices import PriceTable
from finetune_api.job import ObjectMeta
from finetune_api.run_config import GpuHourPrice, RunConfig
from finetune_operator.desired.names import child_name, config_map_name, names_its_data
from finetune_operator.desired.run_config_map import RUN_CONFIG_KEY, build_run_config_map, reports_elsewhere
from finetune_test_operator.snapshot_builder import (
    FULL_SECTIONS,
    INSTALLATION,
    METADATA,
    PREFIX,
    a_config_map,
    a_spec,
)

RENEWED = replace(INSTALLATION, ca_certificate="ANOTHER PEM")


def test_the_same_configuration_is_written_as_yaml_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Mock(side_effect=yaml.safe_dump)
    monkeypatch.setattr(yaml, "safe_dump", write)
    job = METADATA.model_copy(update={"uid": "of-this-test"})
    first, again = (build_run_config_map(job, a_spec(), PREFIX, INSTALLATION) for _ in range(2))
    assert (write.call_count, first) == (1, again)
    assert build_run_config_map(job, a_spec(), "elsewhere", INSTALLATION)["data"] != first["data"]
    assert write.call_count == 2


def test_the_run_config_survives_the_config_map() -> None:
    spec = a_spec(**FULL_SECTIONS)
    config = RunConfig.from_yaml(a_config_map(spec)["data"][RUN_CONFIG_KEY])
    assert config.model == spec.model
    assert config.output_prefix == PREFIX
    assert config.progress is not None
    assert config.progress.url == (
        "https://operator:8443/apis/finetune.dev/v1alpha1/namespaces/team/finetunejobs/bot/status"
    )


def test_the_price_of_the_jobs_gpu_reaches_the_pod_and_is_absent_without_one() -> None:
    prices = PriceTable.parse('{"currency": "EUR", "gpus": [{"gpuResourceName": "nvidia.com/gpu", "perHour": 2.5}]}')
    installation = replace(INSTALLATION, prices=prices)
    fits, other = (
        a_spec(resources={"gpus": 1}),
        a_spec(resources={"gpus": 1, "gpuResourceName": "nvidia.com/mig-1g.5gb"}),
    )
    for spec, price in ((fits, GpuHourPrice(currency="EUR", per_hour=2.5)), (other, None)):
        mounted = a_config_map(spec, installation)["data"][RUN_CONFIG_KEY]
        assert RunConfig.from_yaml(mounted).price == price
        assert ("price:" in mounted) is (price is not None)


@pytest.mark.parametrize("name", ["a", "a.b.c", "x" * 253])
def test_a_name_is_one_that_kubernetes_takes(name: str) -> None:
    job = ObjectMeta(name=name, uid="u")
    found = config_map_name(job, {"a": "b"})
    assert found.startswith(child_name(job))
    assert len(found) <= 80


def test_every_change_of_the_file_gives_another_name() -> None:
    files = (a_config_map(), a_config_map(a_spec(training={"seed": 2})), a_config_map(installation=RENEWED))
    assert len({file["metadata"]["name"] for file in files}) == 3
    assert a_config_map() == a_config_map()


CHANGES: dict[str, tuple[Json, bool]] = {
    "as it was made": ({}, True),
    "other data": ({"data": {RUN_CONFIG_KEY: "seed: 2"}}, False),
    "one more file": ({"data": a_config_map()["data"] | {"a": "b"}}, False),
    "no data": ({"data": None}, False),
    "one that can be changed": ({"immutable": False}, False),
}


@pytest.mark.parametrize(("changes", "expected"), CHANGES.values(), ids=CHANGES)
def test_another_file_under_its_name_is_noticed(changes: Json, expected: bool) -> None:
    assert names_its_data(a_config_map() | changes) is expected


def test_a_pod_that_reports_elsewhere_is_noticed() -> None:
    assert METADATA.name in a_config_map()["metadata"]["name"]
    assert reports_elsewhere(a_config_map(), METADATA, RENEWED)
    assert reports_elsewhere(a_config_map(), METADATA, replace(INSTALLATION, progress_url="https://moved:8443"))
    assert not reports_elsewhere(a_config_map(), METADATA, replace(INSTALLATION, trainer_image="another"))
    assert not reports_elsewhere({"data": {RUN_CONFIG_KEY: ":"}}, METADATA, RENEWED)


def test_what_a_config_map_says_is_read_once_as_it_never_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Mock(side_effect=yaml.safe_load)
    monkeypatch.setattr(yaml, "safe_load", read)
    other = {"data": {RUN_CONFIG_KEY: a_config_map()["data"][RUN_CONFIG_KEY] + "# of another job\n"}}
    for config_map in (other, copy.deepcopy(other), copy.deepcopy(other)):
        assert reports_elsewhere(config_map, METADATA, RENEWED)
    assert read.call_count == 1
