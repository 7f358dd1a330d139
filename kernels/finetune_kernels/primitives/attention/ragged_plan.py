"""Plans of cuDNN's attention for sequences of mixed lengths: what one is compiled for, and its graph.

A plan is compiled once for sizes that are rounded up: the number of sequences and the longest of them to powers of two,
the tokens to a multiple of 4,096. Sequences that a pass does not have are empty, and rows beyond a sequence's end are
left out by the kernel, so that a plan serves every pass that fits into it.

Source: NVIDIA, "cuDNN frontend", scaled dot product attention with ragged offsets (padding mask, causal diagonal).
"""

import importlib.util
import logging
from enum import IntEnum, auto
from functools import cache
from typing import Any, NamedTuple

import torch
from triton import next_power_of_2

from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv

log = logging.getLogger(__name__)
PACKAGE = "cudnn"
TOKENS = 4_096
MIN_SEQUENCES, MIN_LENGTH = 8, 128


@cache
def backend() -> Any | None:
    """The package nvidia-cudnn-frontend, or None where it is missing."""
    return None if importlib.util.find_spec(PACKAGE) is None else importlib.import_module(PACKAGE)


class Uid(IntEnum):
    """Numbers by which a plan knows its tensors."""

    Q = auto()
    K = auto()
    V = auto()
    OUT = auto()
    SUMS = auto()
    DOUT = auto()
    DQ = auto()
    DK = auto()
    DV = auto()
    LENGTHS = auto()
    Q_OFFSETS = auto()
    K_OFFSETS = auto()
    V_OFFSETS = auto()
    OUT_OFFSETS = auto()
    SUMS_OFFSETS = auto()


class PlanKey(NamedTuple):
    """Everything that a plan is compiled for."""

    dtype: torch.dtype
    heads: int
    kv_heads: int
    size: int
    rows: tuple[int, int, int]
    """Elements from a row of q, k and v to the next."""
    sequences: int
    longest: int
    tokens: int
    scale: float

    @classmethod
    def of(cls, qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> "PlanKey":
        """Returns the key of a pass, its sizes rounded up."""
        _, heads, size = qkv.q.shape
        q_row, k_row, v_row = (part.stride(0) for part in qkv)
        return cls(
            qkv.q.dtype, heads, qkv.k.shape[1], size, (q_row, k_row, v_row),
            max(MIN_SEQUENCES, next_power_of_2(sequences.count)),
            max(MIN_LENGTH, next_power_of_2(sequences.max_seqlen)),
            -(-sequences.tokens // TOKENS) * TOKENS, params.scale,
        )  # fmt: skip


class Plans(NamedTuple):
    """Both directions of a key, compiled."""

    forward: Any
    backward: Any


@cache
def plans(key: PlanKey, handle: int) -> Plans | None:
    """Compiles a key for a thread's handle; returns None, and says why, if cuDNN has no kernel for one direction."""
    library = backend()
    assert library is not None
    try:
        return Plans(*(_compiled(describe(key, handle=handle)) for describe in (described_forward, described_backward)))
    except (library.cudnnGraphNotSupportedError, RuntimeError) as error:
        log.warning("FlashAttention takes heads of %d elements here: cuDNN refuses them (%s)", key.size, error)
        return None


def _compiled(graph: Any) -> Any:
    library = backend()
    assert library is not None
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([library.heur_mode.A, library.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph


class _Description:
    """A graph of cuDNN's under construction, with the tensors that both directions have."""

    def __init__(self, key: PlanKey, **options: Any) -> None:
        """`options` are cuDNN's: the handle, or the card to describe for."""
        self.library: Any = backend()
        assert self.library is not None, "nvidia-cudnn-frontend is missing"
        self.key = key
        kinds = self.library.data_type
        self.int32, self.float32 = kinds.INT32, kinds.FLOAT
        self.kind = {torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF}[key.dtype]
        self.graph = self.library.pygraph(
            io_data_type=self.kind, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT, **options
        )

        self.lengths = self._vector(Uid.LENGTHS, key.sequences)
        offsets = (self.offsets(uid) for uid in (Uid.Q_OFFSETS, Uid.K_OFFSETS, Uid.V_OFFSETS))
        self.layouts = tuple(zip((key.heads, key.kv_heads, key.kv_heads), key.rows, offsets, strict=True))
        """Heads, elements from row to row, and offsets of q, k and v."""
        self.q, self.k, self.v = (
            self.rows(uid, *layout) for uid, layout in zip((Uid.Q, Uid.K, Uid.V), self.layouts, strict=True)
        )
        self.out_offsets, self.sums_offsets = self.offsets(Uid.OUT_OFFSETS), self.offsets(Uid.SUMS_OFFSETS)
        self.out_row = key.heads * key.size

    def _vector(self, uid: Uid, length: int) -> Any:
        return self.graph.tensor(
            dim=[length, 1, 1, 1], stride=[1, 1, 1, 1], data_type=self.int32, name=uid.name, uid=int(uid)
        )

    def offsets(self, uid: Uid) -> Any:
        """Beginnings of the sequences, and the end of the last."""
        return self._vector(uid, self.key.sequences + 1)

    def shape(self, heads: int, row: int) -> tuple[list[int], list[int]]:
        """Sizes and strides of rows [T, heads, D] as sequences, heads, tokens, elements."""
        count, longest, size = self.key.sequences, self.key.longest, self.key.size
        return [count, heads, longest, size], [longest * row, size, row, 1]

    def rows(self, uid: Uid, heads: int, row: int, offsets: Any) -> Any:
        """An input [T, heads, D] with `row` elements from row to row."""
        sizes, strides = self.shape(heads, row)
        return self.graph.tensor(
            dim=sizes, stride=strides, data_type=self.kind, ragged_offset=offsets, name=uid.name, uid=int(uid)
        )

    @property
    def sums_shape(self) -> tuple[list[int], list[int]]:
        """Sizes and strides of the softmax sums [T, H]."""
        count, heads, longest = self.key.sequences, self.key.heads, self.key.longest
        return [count, heads, longest, 1], [longest * heads, 1, heads, 1]

    def store(self, tensor: Any, uid: Uid, shape: tuple[list[int], list[int]], offsets: Any) -> None:
        """Makes `tensor` an output."""
        tensor.set_output(True).set_dim(shape[0]).set_stride(shape[1]).set_ragged_offset(offsets).set_uid(int(uid))

    @property
    def options(self) -> dict[str, Any]:
        """The scores' options, of either direction: each token sees its sequence up to itself."""
        return {
            "attn_scale": self.key.scale, "use_padding_mask": True, "seq_len_q": self.lengths,
            "seq_len_kv": self.lengths, "diagonal_alignment": self.library.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,
        }  # fmt: skip


def described_forward(key: PlanKey, **options: Any) -> Any:
    """The forward pass as a graph of cuDNN's; `options` are those of its graph."""
    made = _Description(key, **options)
    out, sums = made.graph.sdpa(q=made.q, k=made.k, v=made.v, generate_stats=True, name="forward", **made.options)
    made.store(out, Uid.OUT, made.shape(key.heads, made.out_row), made.out_offsets)
    sums.set_data_type(made.float32)
    made.store(sums, Uid.SUMS, made.sums_shape, made.sums_offsets)
    return made.graph


def described_backward(key: PlanKey, **options: Any) -> Any:
    """The backward pass as a graph of cuDNN's; `options` are those of its graph."""
    made = _Description(key, **options)
    out = made.rows(Uid.OUT, key.heads, made.out_row, made.out_offsets)
    dout = made.rows(Uid.DOUT, key.heads, made.out_row, made.out_offsets)
    sizes, strides = made.sums_shape
    sums = made.graph.tensor(
        dim=sizes, stride=strides, data_type=made.float32, ragged_offset=made.sums_offsets, name="SUMS",
        uid=int(Uid.SUMS),
    )  # fmt: skip

    gradients = made.graph.sdpa_backward(
        q=made.q, k=made.k, v=made.v, o=out, dO=dout, stats=sums, max_total_seq_len_q=key.tokens,
        max_total_seq_len_kv=key.tokens, name="backward", **made.options,
    )  # fmt: skip
    # The kernel finds a sequence's gradients by the offsets of its inputs, whatever offsets the gradients have.
    for gradient, uid, (heads, row, offsets) in zip(
        gradients, (Uid.DQ, Uid.DK, Uid.DV), made.layouts, strict=True
    ):  # fmt: skip
        made.store(gradient, uid, made.shape(heads, row), offsets)
    return made.graph
