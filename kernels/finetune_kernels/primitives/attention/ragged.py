"""Attention of packed sequences by cuDNN's kernel for ragged tensors, where the package nvidia-cudnn-frontend is.

PyTorch reaches cuDNN for batches of one length only: its own call for mixed lengths compiles a plan each time. Plans of
ours serve every pass of about their size (`ragged_plan`).

Shapes: q [T, H, D], k and v [T, H_kv, D], each perhaps a view of longer rows -> out [T, H, D], softmax sums [T, H].
"""

import threading
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from finetune_kernels.primitives.attention import cudnn_cards
from finetune_kernels.primitives.attention.halves import MAX_SEQUENCES, Saved
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_kernels.primitives.attention.ragged_plan import PlanKey, Uid, backend, plans

MAX_HEAD_SIZE = 128
MAX_OFFSET = 2**31
"""Offsets of sequences are in elements, as int32."""


@dataclass(frozen=True)
class Bounds:
    """Places of a pass's sequences, in a plan's form."""

    ends: torch.Tensor
    """Cumulative lengths, int32 [sequences of the plan + 1]."""
    lengths: torch.Tensor
    """int32 [sequences of the plan]"""

    @classmethod
    def of(cls, sequences: PackedSequences, count: int) -> "Bounds":
        """Returns the bounds with empty sequences behind, up to `count`."""
        ends = pad(sequences.cu_seqlens, (0, count - sequences.count), value=sequences.tokens)
        return cls(ends, ends.diff())


class LatestBounds:
    """The bounds of the sequences that were asked for last: all layers of a pass have the same."""

    def __init__(self) -> None:
        self._asked: tuple[torch.Tensor, int, int] | None = None
        self._bounds: Bounds | None = None
        self._offsets: dict[int, torch.Tensor] = {}

    def of(self, sequences: PackedSequences, count: int) -> Bounds:
        """Returns `Bounds.of`, made again if the sequences are others or were overwritten."""
        asked = (sequences.cu_seqlens, sequences.cu_seqlens._version, count)
        is_same = self._asked is not None and self._asked[0] is asked[0] and self._asked[1:] == asked[1:]
        if self._bounds is None or not is_same:
            self._asked, self._bounds, self._offsets = asked, Bounds.of(sequences, count), {}
        return self._bounds

    def offsets(self, row: int) -> torch.Tensor:
        """Elements before each sequence of the latest bounds, int32; `row`: elements from one row to the next."""
        assert self._bounds is not None
        if row not in self._offsets:
            self._offsets[row] = self._bounds.ends * row
        return self._offsets[row]


_latest = LatestBounds()
_handles = threading.local()


def takes(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> bool:
    """True if the kernel computes this attention, on a card where it is the faster one."""
    q = qkv.q
    is_plain = params.softcap is None and params.sinks is None
    is_whole = params.effective_window(sequences.max_seqlen) is None
    if not (is_plain and is_whole and q.dtype in (torch.bfloat16, torch.float16)):
        return False

    size = q.shape[2]
    fits = size <= MAX_HEAD_SIZE and size % 8 == 0 and all(part.stride()[1:] == (size, 1) for part in qkv)
    fits = fits and sequences.count <= MAX_SEQUENCES
    fits = fits and max(part.stride(0) for part in qkv) * sequences.tokens < MAX_OFFSET
    if not fits or backend() is None or not cudnn_cards.is_faster(q.device):
        return False
    return plans(PlanKey.of(qkv, sequences, params), _handle(q.device)) is not None


def forward(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> tuple[torch.Tensor, Saved]:
    """Returns out [T, H, D] and, for `backward`, the softmax sums [T, H] in fp32."""
    key = PlanKey.of(qkv, sequences, params)
    out = torch.empty_like(qkv.q, memory_format=torch.contiguous_format)
    sums = qkv.q.new_empty(qkv.q.shape[:2], dtype=torch.float32)

    tensors = _inputs(qkv, sequences, key) | {Uid.OUT: out, Uid.SUMS: sums}
    _run(key, tensors, backward=False)
    return out, (sums,)


def backward(
    dout: torch.Tensor, qkv: Qkv, out: torch.Tensor, saved: Saved, sequences: PackedSequences,
    params: AttentionParams,
) -> Qkv:  # fmt: skip
    """Returns the gradients of q, k and v, laid out as they are; `dout` and `out` are [T, H, D] without gaps."""
    key, found = PlanKey.of(qkv, sequences, params), empty_gradients(qkv)
    tensors = _inputs(qkv, sequences, key) | {Uid.OUT: out, Uid.SUMS: saved[0], Uid.DOUT: dout}
    tensors |= {Uid.DQ: found.q, Uid.DK: found.k, Uid.DV: found.v}
    _run(key, tensors, backward=True)
    return found


def empty_gradients(qkv: Qkv) -> Qkv:
    """Returns memory for the gradients, with the rows that q, k and v have: the kernel looks for sequences of a
    gradient where those of its input begin."""
    widths = [part.shape[1] * part.shape[2] for part in qkv]
    if {part.stride(0) for part in qkv} == {sum(widths)}:  # views of one projection, as their gradients are
        whole = qkv.q.new_empty(qkv.q.shape[0], sum(widths))
        return Qkv(*(part.view(like.shape) for part, like in zip(torch.split(whole, widths, dim=1), qkv, strict=True)))
    return Qkv(*(part.new_empty_strided(part.shape, part.stride()) for part in qkv))


def _inputs(qkv: Qkv, sequences: PackedSequences, key: PlanKey) -> dict[int, torch.Tensor]:
    """q, k and v, and where the sequences are in everything that a plan reads and writes."""
    bounds, offsets = _latest.of(sequences, key.sequences), _latest.offsets
    q_row, k_row, v_row = key.rows
    return {
        Uid.Q: qkv.q, Uid.K: qkv.k, Uid.V: qkv.v, Uid.LENGTHS: bounds.lengths,
        Uid.Q_OFFSETS: offsets(q_row), Uid.K_OFFSETS: offsets(k_row), Uid.V_OFFSETS: offsets(v_row),
        Uid.OUT_OFFSETS: offsets(key.heads * key.size), Uid.SUMS_OFFSETS: offsets(key.heads),
    }  # fmt: skip


def _run(key: PlanKey, tensors: dict[int, torch.Tensor], *, backward: bool) -> None:
    """Launches a plan of a key that `takes` has looked at, on the current stream."""
    device = tensors[Uid.Q].device
    handle = _handle(device)
    found = plans(key, handle)
    assert found is not None
    graph = found.backward if backward else found.forward
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=device)
    graph.execute({int(uid): tensor.data_ptr() for uid, tensor in tensors.items()}, workspace.data_ptr(), handle=handle)


def _handle(device: torch.device) -> int:
    """This thread's handle of cuDNN, on the current stream."""
    library, known = backend(), _handles.__dict__.setdefault("of", {})
    assert library is not None
    if device.index not in known:
        known[device.index] = library.create_handle()
    library.set_stream(stream=torch.cuda.current_stream(device).cuda_stream, handle=known[device.index])
    return int(known[device.index])
