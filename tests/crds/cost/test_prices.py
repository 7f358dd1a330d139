"""Prices of GPUs: the first that fits is paid, and a wrong table is refused with the place of each mistake."""

import json

import pytest

from finetune_api.cost.prices import Price, PriceTable
from finetune_api.spec.run import ResourcesSpec

H100 = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
TABLE = PriceTable.parse(
    json.dumps(
        {
            "currency": "EUR",
            "gpus": [
                {"nodeSelector": H100 | {"pool": "spot"}, "perHour": 0.9},
                {"nodeSelector": H100, "perHour": 2.5},
                {"gpuResourceName": "nvidia.com/mig-3g.40gb", "perHour": 1.1},
                {"perHour": 1.5},
            ],
        }
    )
)
CASES: dict[str, tuple[dict[str, object], float]] = {
    "a product": ({"node_selector": H100}, 2.5),
    "the same product in a cheaper pool": ({"node_selector": H100 | {"pool": "spot", "zone": "a"}}, 0.9),
    "another product": ({"node_selector": {"nvidia.com/gpu.product": "Tesla-T4"}}, 1.5),
    "a partition": ({"gpu_resource_name": "nvidia.com/mig-3g.40gb"}, 1.1),
    "nothing said": ({}, 1.5),
}


@pytest.mark.parametrize(("resources", "per_hour"), CASES.values(), ids=CASES)
def test_the_first_price_that_fits_is_paid(resources: dict[str, object], per_hour: float) -> None:
    assert TABLE.find(ResourcesSpec.model_validate(resources)) == Price("EUR", per_hour)


def test_a_job_that_no_price_fits_has_none() -> None:
    table = PriceTable.parse(json.dumps({"gpus": [{"nodeSelector": H100, "perHour": 2.5}]}))
    assert table.find(ResourcesSpec()) is None


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("{", "the text"),
        ('{"currency": "dollars"}', "currency"),
        ('{"gpus": [{"perHour": -1}]}', "gpus.0.perHour"),
        ('{"gpus": [{"price": 1}]}', "gpus.0"),
    ],
)
def test_a_wrong_table_is_refused_with_the_place(text: str, place: str) -> None:
    with pytest.raises(ValueError, match=place):
        PriceTable.parse(text)
