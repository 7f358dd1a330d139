"""Decides which passes through a model's layers are launched as graphs, and keeps the graphs.

A pass is recorded once passes of its shape have come a few times: until then everything that compiles, tunes itself or
is made at its first use has done so. Recorded layers keep a pass's activations, in memory of their own; a pass of
another shape runs as before, beside them. So passes are recorded only where that memory is free, and where the GPU has
waited for the host: elsewhere nothing would be gained. Graphs that turn out to be no faster are given up.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from finetune_kernels.graphs.host_pace import Pace
from finetune_kernels.graphs.pass_shape import PassShape
from finetune_kernels.graphs.recorded_function import Outputs, Place, RecordedFunction
from finetune_kernels.graphs.recorder import Launch, Recorder, Result, release_workspaces
from finetune_kernels.graphs.trial import PassTimes, TimedPass, Trial
from finetune_kernels.primitives.attention.inputs import PackedSequences

log = logging.getLogger(__name__)
EAGER_PASSES = 3
"""Passes of a shape before it is recorded."""
WAITING_PASSES = 2
"""The last of them in which the GPU has to have waited for the host: while kernels are compiled it always does."""
MAX_SHAPES = 4
"""Shapes that are recorded: each keeps the activations of a pass."""
MAX_COUNTED = 1024
"""Shapes that are counted until counting begins anew: where a layer cannot be recorded, most packs have their own."""


class FallibleRecorder:
    """A recorder after whose first failure functions just run, so that the pass amid which it failed ends well."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.has_failed = False

    def record(self, run: Callable[[], Result]) -> tuple[Result, Launch]:
        """Records `run`; see `Recorder`. Raises OutOfMemoryError: then a pass is repeated in less memory."""
        if not self.has_failed:
            try:
                return self._recorder.record(run)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.has_failed = True
                log.warning("layers are launched kernel by kernel, as they cannot be recorded: %s", error)
        return run(), lambda: None


class RecordedPass:
    """The layers at one shape, and the addresses of what they share."""

    def __init__(self, recorder: Recorder, shape: PassShape, sequences: PackedSequences) -> None:
        self._recorder, self._outputs = FallibleRecorder(recorder), Outputs(shape.rows)
        self._ends = Place(sequences.cu_seqlens, stays=False, rows=shape.sequences + 1)
        self._shared: list[tuple[Place | None, ...]] = []
        self.sequences = PackedSequences(
            self._ends.tensor, shape.longest, shape.rows, is_bounded=shape.is_bound, comes_again=sequences.comes_again
        )
        """The sequences of whatever pass runs now."""
        self.layers: dict[int, RecordedFunction] = {}

    @property
    def has_failed(self) -> bool:
        """True if layers could not be recorded."""
        return self._recorder.has_failed

    @property
    def is_void(self) -> bool:
        """True if layers could not be recorded, or a parameter is no longer where it was then."""
        return self.has_failed or any(layer.has_moved for layer in self.layers.values())

    def begin(self, sequences: PackedSequences) -> None:
        """Takes the sequences of a new pass. The rows behind them are one more, and all further ones are empty."""
        self._ends.bring(sequences.cu_seqlens, beyond=self.sequences.tokens)

    def share(self, number: int, tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Returns `tensors`, the shared inputs of this number in the pass, where recorded layers read them."""
        if number == len(self._shared):
            places = (None if one is None else Place(one, stays=False, rows=self.sequences.tokens) for one in tensors)
            self._shared.append(tuple(places))
        for place, tensor in zip(self._shared[number], tensors, strict=True):
            if place is not None and tensor is not None:
                place.bring(tensor)
        return [None if place is None else place.tensor for place in self._shared[number]]

    def add(
        self, index: int, function: Any, others: Sequence[Any], parameters: Sequence[torch.nn.Parameter]
    ) -> None:  # fmt: skip
        """Records `function(x, *others, *parameters)` as layer `index`, at its next call."""
        self.layers[index] = RecordedFunction(function, others, parameters, self._recorder, self._outputs)


class LayerGraphs:
    """The recorded passes of one model."""

    def __init__(
        self, new_recorder: Callable[[], Recorder], has_room: Callable[[], bool], pace: Pace, times: PassTimes
    ) -> None:
        """`has_room`: tells if the activations of one more pass fit into memory."""
        self._new_recorder, self._has_room, self._pace, self._times = new_recorder, has_room, pace, times
        self._seen: Counter[PassShape] = Counter()
        self._waited: Counter[PassShape] = Counter()
        """Passes of a shape, one after the other, in which the GPU has waited."""
        self._running: PassShape | None = None
        """Shape of the pass that runs kernel by kernel."""
        self._recorded: dict[PassShape, RecordedPass] = {}
        self._trials: defaultdict[PassShape, Trial] = defaultdict(Trial)
        self._is_timed = False
        """True if the pass that runs is timed; one of evaluation is not."""
        self._failed = False

    @property
    def has_some(self) -> bool:
        """True if a pass has been recorded."""
        return bool(self._recorded)

    def forget(self) -> None:
        """Lets go of all recordings: what the layers launch is about to change."""
        self._seen.clear()
        self._waited.clear()
        self._trials.clear()
        self._times.forget()
        if self._recorded:
            self._recorded.clear()
            release_workspaces()

    def begin(self, hidden: torch.Tensor, sequences: PackedSequences, *, pads: bool = False) -> RecordedPass | None:
        """Begins a pass through all layers; returns None if it runs kernel by kernel. `hidden`: the first layer's
        input; `pads`: all layers can be recorded, so that a recording may have more rows."""
        self._note_pace()
        self._is_timed = False
        for took in self._times.done():
            self._judge(took)
        if self._failed or not torch.is_grad_enabled():
            return None
        shape = PassShape.of(sequences, trains_input=hidden.requires_grad, pads=pads)
        if len(self._seen) >= MAX_COUNTED:
            self._seen.clear()
            self._waited.clear()
        self._seen[shape] += 1
        if any(one.is_void for one in self._recorded.values()):
            self._failed = any(one.has_failed for one in self._recorded.values())
            self.forget()

        if shape not in self._recorded:
            if not self._is_wanted(shape):
                self._running = shape
                if self._seen[shape] > 1:  # what compiles in the first one tells nothing
                    self._time(shape, sequences)
                return None
            log.info("passes of %d tokens in %d sequences are launched as graphs", shape.rows, shape.sequences)
            self._recorded[shape] = RecordedPass(self._new_recorder(), shape, sequences)
        else:
            self._time(shape, sequences)
        found = self._recorded[shape]
        found.begin(sequences)
        return found

    def launched(self, left: int) -> None:
        """Takes note that a layer has been launched, and `left` layers of the pass have not."""
        if self._running is not None:
            self._pace.launched(left)
        if left == 0 and self._is_timed:
            self._times.end()

    def _time(self, shape: PassShape, sequences: PackedSequences) -> None:
        """Begins to time the pass, unless its trial is over."""
        self._is_timed = not self._trials[shape].is_over
        if self._is_timed:
            self._times.begin(shape, sequences.tokens, is_recorded=shape in self._recorded)

    def _judge(self, took: TimedPass) -> None:
        """Takes note of a pass that the GPU has done; gives up graphs of its shape that have turned out no faster."""
        trial = self._trials[took.shape]
        if trial.note(took) and took.shape in self._recorded:
            log.info("passes of %d tokens are %.2f times as fast as graphs", took.shape.rows, trial.gain)
            if trial.is_lost:
                log.info("so they are launched kernel by kernel again")
                del self._recorded[took.shape]
                if not self._recorded:
                    release_workspaces()

    def _note_pace(self) -> None:
        """Counts the pass before, if it ran kernel by kernel."""
        if self._running is not None:
            if self._pace.gpu_waits:
                self._waited[self._running] += 1
            else:
                self._waited.pop(self._running, None)
            self._running = None

    def _is_wanted(self, shape: PassShape) -> bool:
        """True if passes of a shape that is not recorded are to be recorded from now on."""
        if self._seen[shape] <= EAGER_PASSES or self._waited[shape] < WAITING_PASSES or self._trials[shape].is_lost:
            return False
        return len(self._recorded) < MAX_SHAPES and self._has_room()
