"""Attention by cuDNN's ragged layout as far as a CPU can see it: what plans are made for, where sequences are, and
graphs that cuDNN accepts for a card that is not there. test_gpu_ragged.py computes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from finetune_kernels.primitives.attention import cudnn_cards, ragged, ragged_plan
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_kernels.primitives.attention.ragged import Bounds, LatestBounds
from finetune_kernels.primitives.attention.ragged_plan import PlanKey, described_backward, described_forward

PARAMS = AttentionParams(0.125)
HOPPER = {"sm_version": 900, "sm_count": 132}


def packed(*lengths: int) -> PackedSequences:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedSequences(ends, max(lengths), sum(lengths))


def merged(rows: int, heads: int = 4, kv_heads: int = 2, size: int = 64, dtype: torch.dtype = torch.bfloat16) -> Qkv:
    """q, k and v as views of one projection's output."""
    whole = torch.zeros(rows, heads + 2 * kv_heads, size, dtype=dtype)
    q, k, v = whole.split([heads, kv_heads, kv_heads], dim=1)
    return Qkv(q, k, v)


def key_of(*lengths: int, **sizes: Any) -> PlanKey:
    return PlanKey.of(merged(sum(lengths), **sizes), packed(*lengths), PARAMS)


def test_passes_of_about_one_size_share_a_plan_and_others_do_not() -> None:
    first = key_of(300, 40, 700, 9)
    assert (first.sequences, first.longest, first.tokens, first.rows) == (8, 1024, 4096, (512, 512, 512))
    assert key_of(1024, 1, 1) == first
    assert key_of(1025, 1, 1) == first._replace(longest=2048)
    assert key_of(*[1] * 9) == first._replace(sequences=16, longest=128)
    assert key_of(1000, 1000, 1000, 1000, 96) == first
    assert key_of(1000, 1000, 1000, 1000, 97) == first._replace(tokens=8192)
    assert key_of(4, heads=8).rows == (768, 768, 768)


def test_sequences_that_a_pass_does_not_have_are_empty() -> None:
    bounds = Bounds.of(packed(3, 40, 1), 8)
    assert bounds.ends.tolist() == [0, 3, 43, 44, 44, 44, 44, 44, 44]
    assert bounds.lengths.tolist() == [3, 40, 1, 0, 0, 0, 0, 0]
    assert {bounds.ends.dtype, bounds.lengths.dtype} == {torch.int32}


def test_layers_of_a_pass_share_its_bounds_and_sequences_that_change_in_place_have_new_ones() -> None:
    latest, sequences = LatestBounds(), packed(3, 40, 1)
    first = latest.of(sequences, 8)
    offsets = latest.offsets(512)
    assert offsets.tolist()[:4] == [0, 3 * 512, 43 * 512, 44 * 512]
    assert latest.of(sequences, 8) is first
    assert latest.offsets(512) is offsets
    assert latest.of(sequences, 16).ends.numel() == 17

    sequences.cu_seqlens.copy_(torch.tensor([0, 40, 43, 44]))
    assert latest.of(sequences, 8).lengths.tolist()[:3] == [40, 3, 1], "as recorded passes bring them"
    assert latest.offsets(512).tolist()[:4] == [0, 40 * 512, 43 * 512, 44 * 512]
    assert latest.of(packed(3, 40, 1), 8).lengths.tolist()[:3] == [3, 40, 1]


@pytest.mark.parametrize(
    "qkv",
    [
        merged(5),
        Qkv(*(part.contiguous() for part in merged(5))),
        merged(5)._replace(q=torch.zeros(5, 4, 64)),
        merged(5)._replace(v=torch.zeros(5, 2, 64)),
    ],
    ids=["merged", "apart", "q apart", "v apart"],
)
def test_gradients_lie_as_their_inputs_do(qkv: Qkv) -> None:
    """cuDNN places sequences of dq by the offsets of q: rows of another length would be written elsewhere."""
    found = ragged.empty_gradients(qkv)
    assert [(part.shape, part.stride()) for part in found] == [(part.shape, part.stride()) for part in qkv]
    for number, part in enumerate(found):
        part.fill_(number)
    assert [part.unique().tolist() for part in found] == [[0], [1], [2]], "none lies in another"


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"params": AttentionParams(1.0, softcap=5.0)}, False),
        ({"params": AttentionParams(1.0, sinks=torch.zeros(4))}, False),
        ({"params": AttentionParams(1.0, window=40)}, True),
        ({"params": AttentionParams(1.0, window=39)}, False),
        ({"size": 128}, True),
        ({"size": 136}, False),
        ({"size": 60}, False),
        ({"dtype": torch.float32}, False),
        ({"is_faster": False}, False),
        ({"library": None}, False),
        ({"plans": None}, False),
        ({"tokens": 2**22}, False),
        ({"lengths": (1,) * 65_535}, True),
        ({"lengths": (1,) * 65_536}, False),
    ],
    ids=str,
)
def test_only_what_the_kernel_computes_and_computes_faster_goes_to_it(
    change: dict[str, Any], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2^22 rows of 512 elements are 2^31: the last offset is no int32."""
    played(monkeypatch, **{name: change[name] for name in ("library", "plans", "is_faster") if name in change})
    sequences = packed(*change.get("lengths", (3, 40, 1)))
    qkv = merged(44, size=change.get("size", 64), dtype=change.get("dtype", torch.bfloat16))
    sequences = replace(sequences, tokens=change.get("tokens", sequences.tokens))
    assert ragged.takes(qkv, sequences, change.get("params", PARAMS)) is taken


def played(
    monkeypatch: pytest.MonkeyPatch, *, library: Any = ragged_plan, plans: Any = (), is_faster: bool = True
) -> None:
    """A card with cuDNN's package."""
    monkeypatch.setattr(ragged, "backend", lambda: library)
    monkeypatch.setattr(ragged, "plans", lambda *_: plans)
    monkeypatch.setattr(ragged, "_handle", lambda device: 0)
    monkeypatch.setattr(cudnn_cards, "is_faster", lambda device: is_faster)


def test_heads_that_lie_apart_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    played(monkeypatch)
    wide = merged(44, size=128)
    assert not ragged.takes(Qkv(*(part[..., :64] for part in wide)), packed(44), PARAMS)


@pytest.mark.parametrize(
    ("device", "version", "capability", "expected"),
    [
        ("cuda", 91_501, (9, 0), True),
        ("cuda", 91_500, (9, 0), False),
        ("cuda", None, (9, 0), False),
        ("cuda", 92_000, (10, 0), True),
        ("cuda", 92_000, (8, 0), False),
        ("cuda", 92_000, (8, 6), False),
        ("cuda", 92_000, (12, 0), False),
        ("meta", 92_000, (9, 0), False),
    ],
)
def test_cards_and_versions_of_cudnn(
    device: str, version: int | None, capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cudnn_cards.is_faster(torch.device(device)) is expected


def test_what_cudnn_refuses_is_said_once_and_left_to_flash_attention(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(key: PlanKey, **_: Any) -> Any:
        raise RuntimeError("no engine")

    monkeypatch.setattr(ragged_plan, "described_backward", refuse)
    monkeypatch.setattr(ragged_plan, "_compiled", lambda graph: graph)
    monkeypatch.setattr(ragged_plan, "described_forward", lambda key, **_: key)
    ragged_plan.plans.cache_clear()
    assert [ragged_plan.plans(key_of(3, 40), 0) for _ in range(2)] == [None, None]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "FlashAttention takes heads of 64 elements here: cuDNN refuses them (no engine)"
    ragged_plan.plans.cache_clear()


@pytest.mark.parametrize("describe", [described_forward, described_backward])
@pytest.mark.parametrize("sizes", [{}, {"heads": 32, "kv_heads": 8, "size": 128}, {"size": 96, "dtype": torch.float16}])
def test_cudnn_accepts_the_graphs(describe: Any, sizes: dict[str, Any]) -> None:
    graph = describe(key_of(300, 40, 700, 9, **sizes), **HOPPER)
    graph.validate()
    graph.build_operation_graph()


def test_cudnn_refuses_a_graph_that_is_none() -> None:
    """The control: heads of k that do not divide those of q."""
    library: Any = ragged_plan.backend()
    with pytest.raises(library.cudnnGraphNotSupportedError):
        described_forward(key_of(300, 40, heads=4)._replace(kv_heads=3), **HOPPER).validate()
