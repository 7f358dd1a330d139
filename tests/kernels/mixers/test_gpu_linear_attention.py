"""On a GPU with fla-core: linear attention of Qwen 3.5 9B's heads by its kernels, beside transformers' loops, and the
bytes that it needs. Each kernel takes the first of its configurations, as trying all would take minutes.

    python -m pytest -s tests/kernels/mixers/test_gpu_linear_attention.py

prints errors and bytes.
"""

import gc
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch.autograd.graph import get_gradient_edge
from triton.runtime.autotuner import Autotuner, Config

from finetune_kernels.mixers import linear_attention
from finetune_kernels.mixers.linear_attention import CONVOLUTION, DELTA_RULE, takes_ends, use_kernels
from finetune_kernels.mixers.tuning import NORMS, autotuner_of, pin_norms
from finetune_kernels.planning.families import family_of_config
from finetune_kernels.planning.parts.mixer_shape import is_usable, mixer_shape
from finetune_test_kernels.tensor_checks import normal, root_error

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # libraries warn of each other
if not is_usable("fla"):
    reason = "fla-core, with Triton 3.7.1 or newer, is in the trainer's image, and not in development environments"
    pytest.skip(reason, allow_module_level=True)
HIDDEN, DOCUMENTS = 512, (70, 0, 1, 300, 64, 129)
RATIO = 2.0
"""Share of the loops' error in bfloat16: these keep states and their products in fp32, fla the products' inputs in 16
bits."""
Results = dict[str, torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def first_configurations() -> Iterator[None]:
    """Every autotuner of fla with one configuration."""
    import fla.modules.causal_conv1d
    import fla.modules.norm.fused_norm_gate
    import fla.ops.gated_delta_rule  # noqa: F401

    tuners = [found for found in gc.get_objects() if isinstance(found, Autotuner)]
    assert len(tuners) > 20
    pin_norms()
    patch = pytest.MonkeyPatch()
    for tuner in tuners:
        patch.setattr(tuner, "configs", tuner.configs[:1])
    yield
    patch.undo()


def config(hidden: int) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING["qwen3_5_text"](
        hidden_size=hidden, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_key_heads=16,
        linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
    )  # fmt: skip


def mixer(hidden: int, dtype: torch.dtype) -> Any:
    """The module of one layer, frozen, with transformers' functions."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    torch.manual_seed(0)
    module = modeling_qwen3_5.Qwen3_5GatedDeltaNet(config(hidden), 0).to("cuda", dtype)
    for name, weight in module.named_parameters():
        if name.endswith("weight") and weight.ndim == 2:
            torch.nn.init.normal_(weight, std=hidden**-0.5)
    return module.requires_grad_(False)


def without(whole: Any, option: str, *inputs: Any, **options: Any) -> Any:
    """A function without one of its options."""
    return whole(*inputs, **options | {option: None})


def ends() -> torch.Tensor:
    return torch.tensor([0, *DOCUMENTS], device="cuda").cumsum(0).to(torch.int32)


def run(module: Any, rows: torch.Tensor, *, packed: bool) -> Results:
    """Output and the gradient of the rows, packed or each document by itself."""
    rows = rows.clone().requires_grad_()
    if packed:
        assert takes_ends(module, rows)
        out = module(rows[None], cu_seq_lens_q=ends())[0]
    else:
        out = torch.cat([module(part[None])[0] for part in rows.split(list(DOCUMENTS)) if len(part)])
    (gradient,) = torch.autograd.grad(out, rows, normal(*out.shape, seed=5, dtype=out.dtype))
    return {"output": out.detach(), "gradient": gradient}


def prepared(dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    module = mixer(HIDDEN, dtype)
    use_kernels(module)
    return module, normal(sum(DOCUMENTS), HIDDEN, seed=4, dtype=dtype)


@pytest.fixture(scope="module")
def exact() -> Results:
    """By the loops in fp32, of weights and rows that bfloat16 can say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_attention, "on_gpu", lambda tensor: False)
        module, rows = prepared(torch.bfloat16)
        return run(module.float(), rows.float(), packed=False)


@pytest.fixture(scope="module")
def rounded(exact: Results) -> dict[str, float]:
    """Errors of the loops in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_attention, "on_gpu", lambda tensor: False)
        found = run(*prepared(torch.bfloat16), packed=False)
    return {name: root_error(found[name], value) for name, value in exact.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_documents_are_as_each_alone_by_the_loops(
    dtype: torch.dtype, exact: Results, rounded: dict[str, float]
) -> None:
    module, rows = prepared(torch.bfloat16)
    found = run(module.to(dtype), rows.to(dtype), packed=True)
    for name, value in exact.items():
        error = root_error(found[name], value)
        print(f"{dtype} {name}: {error:.1e} by kernels, {rounded[name]:.1e} by loops in bfloat16")
        assert error <= RATIO * rounded[name]


def test_no_document_sees_another() -> None:
    module, rows = prepared(torch.bfloat16)
    other = rows.clone()
    other[: DOCUMENTS[0]].neg_()
    one, two = (run(module, packed, packed=True) for packed in (rows, other))
    rest = slice(DOCUMENTS[0], None)
    assert not torch.equal(one["output"][: DOCUMENTS[0]], two["output"][: DOCUMENTS[0]]), "the control"
    assert all(torch.equal(one[name][rest], two[name][rest]) for name in one)


def test_functions_without_the_ends_let_documents_see_each_other(
    exact: Results, rounded: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, rows = prepared(torch.bfloat16)
    file = linear_attention._file_of(module)
    for name, option in ((DELTA_RULE, "cu_seqlens"), (CONVOLUTION, "cu_seq_lens_q")):
        whole = getattr(file, name)
        with monkeypatch.context() as patch:
            patch.setattr(file, name, partial(without, whole, option))
            found = module(rows[None], cu_seq_lens_q=ends())[0]
        assert root_error(found, exact["output"]) > 3 * rounded["output"], name


def test_norms_are_never_tuned() -> None:
    """Triton tunes nothing that has one configuration."""
    kernels = [getattr(import_module(path), name) for path, names in NORMS.items() for name in names]
    left = [[str(config) for config in autotuner_of(kernel).configs] for kernel in kernels]
    assert left == [[str(Config({"BT": 32}, num_warps=4))]] * 4


def test_the_plan_knows_the_bytes() -> None:
    hidden, tokens = 4096, 4096
    module = mixer(hidden, torch.bfloat16)
    use_kernels(module)
    documents = torch.tensor([0, 1000, 3000, tokens], device="cuda", dtype=torch.int32)
    rows, upper = (normal(tokens, hidden, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    rows.requires_grad_()

    def step() -> tuple[float, float]:
        """Bytes a token, of the graph and at most."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = get_gradient_edge(module(rows[None], cu_seq_lens_q=documents))
        graph = torch.cuda.memory_allocated() - before
        torch.autograd.grad([out], rows, upper[None])
        return graph / tokens, (torch.cuda.max_memory_allocated() - before) / tokens

    step()  # compiles
    shape = mixer_shape(config(hidden), family_of_config(config(hidden)))
    assert shape is not None
    planned_graph, planned = shape.graph_bytes, shape.bytes_per_token + 4 * 2 * hidden  # rows of the stream, as planned
    graph, measured = step()
    graph += 2 * hidden  # the rows, which are the test's own
    print(f"{measured / 1024:.0f} KiB a token at most, {planned / 1024:.0f} planned")
    print(f"{graph / 1024:.0f} KiB a token in the graph, {planned_graph / 1024:.0f} planned")
    assert 0.75 * planned < measured <= 1.02 * planned
    assert 0.75 * planned_graph < graph <= 1.02 * planned_graph
