"""Rows of the benchmark of several GPUs. Pure.

Speed is measured with the same work for each GPU (2 x 2,048 tokens a pass, 4 passes a step), curves with the same step
for any number of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune_api.vocabulary import MemoryMode, Parallelism
from speed.rows import Row

WARM_UP, STEPS, CURVE_STEPS = 3, 6, 8
"""Steps before the timed ones, timed steps, and steps of runs that compare curves."""
CHECKPOINT_STEP = 4
"""Step of the run on all GPUs from which fewer go on."""
REPLICATED, SHARDED = Parallelism.REPLICATED, Parallelism.SHARDED


@dataclass(frozen=True)
class Case:
    """One row."""

    name: str
    row: Row
    processes: int
    """Processes that train; the others of the launch wait."""
    parallelism: Parallelism = REPLICATED
    steps: int = WARM_UP + STEPS
    profiled: bool = False
    """True if one more step is profiled."""
    reference: str | None = None
    """Row whose losses this one's are compared with."""
    resumes: bool = False
    """True if it begins at the reference's checkpoint."""
    saves: bool = False
    """True if it leaves a checkpoint of CHECKPOINT_STEP."""
    memory: MemoryMode = MemoryMode.FASTEST
    gigabits: float | None = None
    """Network, in gigabits a second, on which the processes pretend to be nodes; None: they are on one node."""


@dataclass(frozen=True)
class Machine:
    """Machine and models that the rows are made for."""

    gpus: int
    model: str
    """Model of most rows."""
    large: str
    """Model that no card holds."""
    card_gib: float
    """Limit of each card in the large model's rows."""
    length: int = 2048


def cases(machine: Machine) -> dict[str, Case]:
    """Returns all rows by name, in the order in which they are measured."""
    gpus, model, length = machine.gpus, machine.model, machine.length
    each = Row(model, length, 2, 4)
    step = replace(each, accumulation=4 * gpus)
    large_row = Row(machine.large, length, 2, gpus, machine.card_gib)
    same = Row(model, length, 2, gpus)

    found = [
        Case("one", each, 1),
        Case("replicated", step, gpus, profiled=True),
        Case("slow-network", step, gpus, gigabits=10.0),
        Case("sharded", step, gpus, SHARDED, profiled=True, reference="replicated"),
        Case("large-sharded", large_row, gpus, SHARDED, steps=WARM_UP + 3, profiled=True),
        Case("curve-one", same, 1, steps=CURVE_STEPS),
        Case("curve-replicated", same, gpus, steps=CURVE_STEPS, reference="curve-one"),
        Case("curve-sharded", same, gpus, SHARDED, steps=CURVE_STEPS, reference="curve-one", saves=True),
    ]
    fewer = [number for number in (2, 1) if number < gpus]
    found += [
        Case(
            f"resumed-on-{number}", same, number, SHARDED if number > 1 else REPLICATED, steps=CURVE_STEPS,
            reference="curve-sharded", resumes=True,
        )
        for number in fewer
    ]  # fmt: skip
    found.append(Case("large-replicated", replace(large_row, card_gib=None), gpus, steps=WARM_UP + 3))
    return {case.name: case for case in found}


def launches(chosen: Sequence[Case], gpus: int) -> list[tuple[int, list[Case]]]:
    """Returns the number of processes and the rows of each launch: a row on one GPU may share the launch of the others,
    one on fewer than all has its own."""
    found: list[tuple[int, list[Case]]] = []
    for case in chosen:
        processes = case.processes if case.resumes or case.processes not in (1, gpus) else gpus
        if found and found[-1][0] == processes:
            found[-1][1].append(case)
        else:
            found.append((processes, [case]))
    return found


def streamed_cases(machine: Machine) -> dict[str, Case]:
    """Returns rows of one GPU on which weights stream from host memory: all of a model's, and as many of the large
    model's as a limited card needs, in passes of one sequence and of four."""
    model, large, length, card = machine.model, machine.large, machine.length, machine.card_gib
    found = [
        Case("balanced", Row(model, length, 2, 4), 1, memory=MemoryMode.BALANCED),
        Case("smallest-streamed-bs1", Row(model, length, 1, 8), 1, memory=MemoryMode.SMALLEST),
        Case("smallest-streamed-bs4", Row(model, length, 4, 2), 1, memory=MemoryMode.SMALLEST),
        Case("large-streamed-bs1", Row(large, length, 1, 4, card), 1, steps=WARM_UP + 3),
        Case("large-streamed-bs4", Row(large, length, 4, 1, card), 1, steps=WARM_UP + 3),
    ]
    return {case.name: case for case in found}
