"""Memory and speed of the GPU that a job requests, known before the job gets one.

Memory is the total that nvidia-smi shows. Speed is the data sheet's rate of dense bf16 products (fp16 before Ampere).
"""

import re
from collections.abc import Mapping, Sequence

from finetune_api.base import ApiModel
from finetune_api.spec.run import ResourcesSpec

PRODUCT_LABEL = "nvidia.com/gpu.product"
MEMORY_LABEL = "nvidia.com/gpu.memory"
COUNT_LABEL = "nvidia.com/gpu.count"
DRIVER_LABEL = "nvidia.com/cuda.driver-version.major"
CAPABILITY_LABELS = ("nvidia.com/gpu.compute.major", "nvidia.com/gpu.compute.minor")
OLDEST_CAPABILITY, BF16_CAPABILITY = 7.5, 8.0
"""Compute capability of the oldest cards that CUDA 13 knows (Turing), and of those that multiply bfloat16 (Ampere)."""
GPU_ALLOCATOR: Mapping[str, str] = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Environment of whatever trains. Without it, fragments took 11 % of a 40 GiB card: a 70B model ran out of memory that
its plan had counted."""
_WHOLE_DRIVER_LABEL = "nvidia.com/cuda.driver-version.full"
_MEBIBYTE, _GIBIBYTE = 1 << 20, 1 << 30
_UNITS = {unit: 1000**power for power, unit in enumerate(("", "k", "M", "G", "T", "P"))} | {
    f"{unit}i": 1024**power for power, unit in enumerate(("", "K", "M", "G", "T", "P")) if unit
}
# Product as NVIDIA's GPU feature discovery labels nodes: (MiB, TFLOP/s).
_PRODUCTS: Mapping[str, tuple[int, float]] = {
    "NVIDIA-B200": (183_359, 2250),
    "NVIDIA-H200": (143_771, 989),
    "NVIDIA-H200-NVL": (143_771, 835),
    "NVIDIA-GH200-480GB": (97_871, 989),
    "NVIDIA-H100-NVL": (95_830, 835),
    "NVIDIA-H100-80GB-HBM3": (81_559, 989),
    "NVIDIA-H100-PCIe": (81_559, 756),
    "NVIDIA-A100-SXM4-80GB": (81_920, 312),
    "NVIDIA-A100-80GB-PCIe": (81_920, 312),
    "NVIDIA-A100-SXM4-40GB": (40_960, 312),
    "NVIDIA-A100-PCIE-40GB": (40_960, 312),
    "NVIDIA-L40S": (46_068, 362),
    "NVIDIA-L40": (46_068, 181),
    "NVIDIA-L4": (23_034, 121),
    "NVIDIA-A40": (46_068, 150),
    "NVIDIA-A10": (23_028, 125),
    "NVIDIA-A10G": (23_028, 70),
    "NVIDIA-RTX-6000-Ada-Generation": (49_140, 364),
    "NVIDIA-RTX-A6000": (49_140, 155),
    "NVIDIA-RTX-A5000": (24_564, 111),
    "NVIDIA-GeForce-RTX-5090": (32_607, 210),
    "NVIDIA-GeForce-RTX-4090": (24_564, 165),
    "NVIDIA-GeForce-RTX-3090": (24_576, 71),
    "Tesla-V100-SXM2-32GB": (32_768, 125),
    "Tesla-V100-SXM2-16GB": (16_384, 125),
    "Tesla-T4": (15_360, 65),
}
# Board power of the data sheet, in watts, of products whose power is not set by the machine's builder.
_WATTS: Mapping[str, int] = {
    "NVIDIA-B200": 1000,
    "NVIDIA-H200": 700,
    "NVIDIA-H200-NVL": 600,
    "NVIDIA-H100-NVL": 400,
    "NVIDIA-H100-80GB-HBM3": 700,
    "NVIDIA-H100-PCIe": 350,
    "NVIDIA-A100-SXM4-80GB": 400,
    "NVIDIA-A100-80GB-PCIe": 300,
    "NVIDIA-A100-SXM4-40GB": 400,
    "NVIDIA-A100-PCIE-40GB": 250,
    "NVIDIA-L40S": 350,
    "NVIDIA-L40": 300,
    "NVIDIA-L4": 72,
    "NVIDIA-A40": 300,
    "NVIDIA-A10": 150,
    "NVIDIA-RTX-6000-Ada-Generation": 300,
    "NVIDIA-RTX-A6000": 300,
    "NVIDIA-RTX-A5000": 230,
    "NVIDIA-GeForce-RTX-5090": 575,
    "NVIDIA-GeForce-RTX-4090": 450,
    "NVIDIA-GeForce-RTX-3090": 350,
    "Tesla-V100-SXM2-32GB": 300,
    "Tesla-V100-SXM2-16GB": 300,
    "Tesla-T4": 70,
}
_OLD_CARDS = (
    (re.compile(r"\bT4\b|GeForce-RTX-20\d\d|GTX-16\d\d|Quadro-RTX|TITAN-RTX|\bT(?:400|600|1000|1200|2000)\b"), 7.5),
    (re.compile(r"V100|TITAN-V\b|GV100"), 7.0),
    (re.compile(r"\bP(?:100|40|6|4)\b|GTX-10\d\d|TITAN-X|Quadro-G?P\d"), 6.0),
    (re.compile(r"\bM(?:60|40|10|6|4)\b|GTX-9\d\d|Quadro-M\d"), 5.0),
    (re.compile(r"\bK(?:80|40|20)"), 3.5),
)
"""Names of products before Ampere, by generation: Turing, Volta, Pascal, Maxwell, Kepler. Within one generation minor
versions differ, which nothing depends on."""
_PARTITION = re.compile(r"mig-(\d)g\.(\d+)gb")
_SLICES = 7  # compute slices of a card that MIG partitions


class ExpectedGpu(ApiModel):
    """The GPU that the job will run on, as far as spec.resources tells."""

    name: str
    """Product name, name of the extended resource, or "GPU"."""
    memory_bytes: int | None = None
    """Total memory in bytes."""
    teraflops: float | None = None
    """Rate of dense 16-bit products, in TFLOP/s."""
    node_count: int | None = None
    """GPUs of a node, where the node selector names their number and none of them is shared or divided."""
    driver: int | None = None
    """Major version of NVIDIA's driver, where the node selector names it."""
    capability: float | None = None
    """Compute capability, such as 7.5, where the node selector or the product tells; the lowest of several products.
    Products from Ampere on are not told apart."""
    oldest: str = ""
    """What has that compute capability, in words."""
    watts: int | None = None
    """Most power that the whole card takes; None if it is not known, or if the job gets a part of the card."""


def expected_gpu(resources: ResourcesSpec, products: Sequence[str] = ()) -> ExpectedGpu | None:
    """Read the expected GPU from gpuMemory, else from the node selector's labels and the extended resource's name, else
    from the `products` of which the node has one: a job has to fit into the smallest.

    Returns None for a job without a GPU."""
    if resources.gpus == 0:
        return None
    product = resources.node_selector.get(PRODUCT_LABEL) or _smallest(products)

    # A shared or partitioned product has the label of its card with a suffix.
    memory, speed = _known(product.removesuffix("-SHARED").split("-MIG-")[0])
    label = resources.node_selector.get(MEMORY_LABEL, "")
    if label.isdigit():
        memory = int(label) * _MEBIBYTE

    part = _PARTITION.search(f"{resources.gpu_resource_name} {product.replace('-MIG-', '-mig-')}")
    if part is not None:
        memory = int(part[2]) * _GIBIBYTE  # an upper bound: a partition of 40gb has 39.5 GiB
        speed = speed * int(part[1]) / _SLICES if speed else None

    if resources.gpu_memory is not None:
        memory = to_bytes(resources.gpu_memory)
    name = product or (resources.gpu_resource_name if part else "GPU")

    asked = resources.node_selector.get(PRODUCT_LABEL)
    capability, oldest = _find_capability(resources.node_selector, [asked] if asked else products)
    is_whole = not part and not product.endswith("-SHARED")
    count = resources.node_selector.get(COUNT_LABEL, "")
    return ExpectedGpu(
        name=name,
        memory_bytes=memory,
        teraflops=speed,
        capability=capability,
        oldest=oldest,
        watts=_WATTS.get(product) if is_whole else None,
        driver=_asked_driver(resources.node_selector),
        node_count=int(count) if is_whole and count.isdigit() else None,
    )


def _smallest(products: Sequence[str]) -> str:
    """Return the product with the least memory; one that is not known may be smaller than all others."""
    known = [(_PRODUCTS[product][0], product) for product in products if product in _PRODUCTS]
    return min(known)[1] if known and len(known) == len(products) else ""


def _find_capability(node_selector: Mapping[str, str], products: Sequence[str]) -> tuple[float | None, str]:
    """Compute capability that the labels ask for, or the lowest of the products, and what has it."""
    major, minor = (node_selector.get(label, "") for label in CAPABILITY_LABELS)
    if major.isdigit() and (minor.isdigit() or int(major) < int(OLDEST_CAPABILITY)):
        asked = f"{major}.{minor or 0}"
        return float(asked), f"a GPU of compute capability {asked}"

    known = [(value, name) for name in products for pattern, value in _OLD_CARDS if pattern.search(name)]
    return min(known, default=(None, ""))


def _asked_driver(node_selector: Mapping[str, str]) -> int | None:
    """Major version of the driver that a node selector asks for, by the label of that part or of the whole version."""
    asked = node_selector.get(DRIVER_LABEL) or node_selector.get(_WHOLE_DRIVER_LABEL, "").split(".")[0]
    return int(asked) if asked.isdigit() else None


def to_bytes(quantity: int | str) -> int:
    """Bytes of a quantity that `ByteQuantity` has accepted, such as 80Gi."""
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(quantity))
    assert match is not None
    return int(float(match[1]) * _UNITS[match[2]])


def _known(product: str) -> tuple[int | None, float | None]:
    if product not in _PRODUCTS:
        return None, None
    mebibytes, teraflops = _PRODUCTS[product]
    return mebibytes * _MEBIBYTE, teraflops
