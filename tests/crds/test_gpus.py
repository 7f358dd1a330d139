"""What a job says about its GPU."""

from typing import Any

import pytest
from pydantic import ValidationError

from finetune_api.gpus import _PRODUCTS, expected_gpu, to_bytes
from finetune_api.spec.run import ResourcesSpec
from finetune_api.spec.spec import FineTuneJobSpec

GIB, MIB = 2**30, 2**20
PRODUCT = "nvidia.com/gpu.product"

CASES: dict[str, tuple[dict[str, Any], tuple[str, int | None, float | None]]] = {
    "nothing is known": ({}, ("GPU", None, None)),
    "a product": ({"nodeSelector": {PRODUCT: "NVIDIA-H200"}}, ("NVIDIA-H200", 143_771 * MIB, 989)),
    "a product that is shared": (
        {"nodeSelector": {PRODUCT: "NVIDIA-L4-SHARED"}},
        ("NVIDIA-L4-SHARED", 23_034 * MIB, 121),
    ),
    "a product of next year": ({"nodeSelector": {PRODUCT: "NVIDIA-X1"}}, ("NVIDIA-X1", None, None)),
    "a label with the memory": ({"nodeSelector": {"nvidia.com/gpu.memory": "40960"}}, ("GPU", 40 * GIB, None)),
    "a partition by its resource": (
        {"gpuResourceName": "nvidia.com/mig-3g.40gb"},
        ("nvidia.com/mig-3g.40gb", 40 * GIB, None),
    ),
    "a partition by its product": (
        {"nodeSelector": {PRODUCT: "NVIDIA-A100-SXM4-40GB-MIG-1g.5gb"}},
        ("NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", 5 * GIB, 312 / 7),
    ),
    "the user's word": (
        {"gpuMemory": "1.5Gi", "nodeSelector": {PRODUCT: "NVIDIA-H200"}},
        ("NVIDIA-H200", 3 * GIB // 2, 989),
    ),
}


@pytest.mark.parametrize(("fields", "expected"), CASES.values(), ids=CASES)
def test_the_gpu_of_a_job(fields: dict[str, Any], expected: tuple[str, int | None, float | None]) -> None:
    found = expected_gpu(ResourcesSpec.model_validate(fields))
    assert found is not None
    assert (found.name, found.memory_bytes, found.teraflops) == expected


MAJOR, MINOR = "nvidia.com/gpu.compute.major", "nvidia.com/gpu.compute.minor"


@pytest.mark.parametrize(
    ("selector", "products", "expected"),
    [
        ({PRODUCT: "Tesla-T4"}, (), (7.5, "Tesla-T4")),
        ({PRODUCT: "Tesla-T4-SHARED"}, (), (7.5, "Tesla-T4-SHARED")),
        ({PRODUCT: "NVIDIA-GeForce-RTX-2080-Ti"}, (), (7.5, "NVIDIA-GeForce-RTX-2080-Ti")),
        ({PRODUCT: "Quadro-RTX-8000"}, (), (7.5, "Quadro-RTX-8000")),
        ({PRODUCT: "Tesla-V100-SXM2-32GB"}, (), (7.0, "Tesla-V100-SXM2-32GB")),
        ({PRODUCT: "Tesla-P100-PCIE-16GB"}, (), (6.0, "Tesla-P100-PCIE-16GB")),
        ({PRODUCT: "NVIDIA-GeForce-GTX-1080-Ti"}, (), (6.0, "NVIDIA-GeForce-GTX-1080-Ti")),
        ({PRODUCT: "Tesla-M60"}, (), (5.0, "Tesla-M60")),
        ({PRODUCT: "Tesla-K80"}, (), (3.5, "Tesla-K80")),
        ({PRODUCT: "NVIDIA-RTX-2000-Ada-Generation"}, (), (None, "")),
        ({PRODUCT: "NVIDIA-A40"}, ("Tesla-V100-SXM2-16GB",), (None, "")),
        ({}, ("NVIDIA-L4", "Tesla-T4", "Tesla-V100-SXM2-16GB"), (7.0, "Tesla-V100-SXM2-16GB")),
        ({MAJOR: "7", MINOR: "0"}, (), (7.0, "a GPU of compute capability 7.0")),
        ({MAJOR: "6"}, (), (6.0, "a GPU of compute capability 6.0")),
        ({MAJOR: "7"}, (), (None, "")),
        ({MAJOR: "9", MINOR: "0"}, ("Tesla-T4",), (9.0, "a GPU of compute capability 9.0")),
    ],
)
def test_the_compute_capability_of_a_job_s_cards(
    selector: dict[str, str], products: tuple[str, ...], expected: tuple[float | None, str]
) -> None:
    found = expected_gpu(ResourcesSpec.model_validate({"nodeSelector": selector}), products)
    assert found is not None
    assert (found.capability, found.oldest) == expected


def test_no_known_product_is_taken_for_an_older_one() -> None:
    found = {name: expected_gpu(ResourcesSpec(), [name]) for name in _PRODUCTS}
    old = [name for name, gpu in found.items() if gpu is not None and gpu.capability is not None]
    assert old == ["Tesla-V100-SXM2-32GB", "Tesla-V100-SXM2-16GB", "Tesla-T4"]


def test_a_job_without_a_gpu_has_none() -> None:
    assert expected_gpu(ResourcesSpec(gpus=0)) is None


@pytest.mark.parametrize(
    ("quantity", "count"), [(7, 7), ("7", 7), ("2k", 2000), ("2Ki", 2048), ("0.5Gi", GIB // 2), ("3T", 3 * 10**12)]
)
def test_quantities_in_bytes(quantity: int | str, count: int) -> None:
    assert to_bytes(quantity) == count


@pytest.mark.parametrize(
    ("product", "resource", "expected"),
    [
        ("NVIDIA-H200", "nvidia.com/gpu", 8),
        ("NVIDIA-H200-SHARED", "nvidia.com/gpu", None),
        ("NVIDIA-H200", "nvidia.com/mig-1g.18gb", None),
    ],
)
def test_a_node_has_as_many_gpus_as_its_label_says_unless_they_are_parts(
    product: str, resource: str, expected: int | None
) -> None:
    selector = {PRODUCT: product, "nvidia.com/gpu.count": "8"}
    gpu = expected_gpu(ResourcesSpec(node_selector=selector, gpu_resource_name=resource))
    assert gpu is not None
    assert gpu.node_count == expected


@pytest.mark.parametrize(
    ("gpus", "accumulation", "nearest"),
    [
        (2, 5, "4 or 6; or take 1 or 5 GPUs in all"),
        (4, 6, "4 or 8; or take 3 or 6 GPUs in all"),
        (4, 1, "4 or 8; or take 1 GPU in all"),
    ],
)
def test_a_step_that_cannot_be_shared_is_refused_with_the_nearest_that_can(
    gpus: int, accumulation: int, nearest: str
) -> None:
    sections = {
        "model": {"source": "hf://org/model"},
        "dataset": {"source": "hf://org/data"},
        "output": {"s3": {"bucket": "results"}},
        "training": {"batchSize": 1, "gradientAccumulation": accumulation},
    }
    FineTuneJobSpec.model_validate(sections | {"resources": {"gpus": 1}})
    with pytest.raises(ValidationError, match=f"it is {accumulation}: write values whose product is {nearest}"):
        FineTuneJobSpec.model_validate(sections | {"resources": {"gpus": gpus}})


@pytest.mark.parametrize(
    ("labels", "driver"),
    [
        ({"nvidia.com/cuda.driver-version.major": "570"}, 570),
        ({"nvidia.com/cuda.driver-version.full": "580.65.06"}, 580),
        ({"nvidia.com/cuda.driver-version.major": "new"}, None),
        ({}, None),
    ],
)
def test_the_driver_is_what_the_node_selector_asks_for(labels: dict[str, str], driver: int | None) -> None:
    gpu = expected_gpu(ResourcesSpec.model_validate({"nodeSelector": labels}))
    assert gpu is not None
    assert gpu.driver == driver


PRODUCTS = {
    "one": (("NVIDIA-H200",), "NVIDIA-H200"),
    "the smallest of several": (("NVIDIA-H200", "NVIDIA-L4", "NVIDIA-B200"), "NVIDIA-L4"),
    "one that nobody knows may be smaller": (("NVIDIA-H200", "NVIDIA-X1"), "GPU"),
    "none": ((), "GPU"),
}


@pytest.mark.parametrize(("products", "name"), PRODUCTS.values(), ids=PRODUCTS)
def test_a_job_has_to_fit_into_the_smallest_of_its_products(products: tuple[str, ...], name: str) -> None:
    gpu = expected_gpu(ResourcesSpec(), products)
    assert gpu is not None
    assert gpu.name == name
    assert (gpu.memory_bytes is None) is (name == "GPU")
