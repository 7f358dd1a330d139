"""Every case of the kernels' benchmark runs (small, in Triton's interpreter), and costs what its formula says."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import micro, micro_cases
from benchmarks.micro import Timing, judge, write
from benchmarks.micro_cases import Case, Run, Sizes, all_cases
from finetune_kernels.rotary_embedding import Heads

SMALL = Sizes(
    tokens=32, hidden=64, feed_forward=128, heads=Heads(4, 2, 16), vocabulary=96, rank=4, layers=1,
    dtype=torch.float32, device="cpu",
)  # fmt: skip
KERNELS = {
    "rms_norm", "rotary_embedding", "gated_activation", "adapted_activation", "linear_group", "linear_cross_entropy",
    "nf4", "attention", "flat_adamw", "adapter_dropout",
}  # fmt: skip


@pytest.fixture(scope="module")
def cases() -> Iterator[dict[str, Case]]:
    """The cases by kernel."""
    torch.manual_seed(0)
    found = list(all_cases(SMALL))
    yield {case.kernel: case for case in found}
    assert len({case.kernel for case in found}) == len(found)


def test_every_kernel_is_timed(cases: dict[str, Case]) -> None:
    assert {name.split()[0] for name in cases} == KERNELS
    assert {case.unit for case in cases.values()} == {"TB/s", "TFLOP/s"}


def test_every_case_runs_and_so_does_what_stands_beside_it(cases: dict[str, Case]) -> None:
    for case in cases.values():
        for run in (case.run, case.eager, case.rival):
            if run is not None:
                run()
                run()  # do_bench calls again and again


def test_eager_computes_the_same(cases: dict[str, Case]) -> None:
    for name in ("rms_norm forward, residual", "gated_activation backward", "adapted_activation forward",
                 "linear_cross_entropy", "attention backward, cuDNN, 2 documents"):  # fmt: skip
        case = cases[name]
        assert case.eager is not None
        ours, eager = case.run(), case.eager()
        if name == "rms_norm forward, residual":
            ours = ours[1]
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, eager)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_bytes_and_operations_are_those_of_the_formulas(cases: dict[str, Case]) -> None:
    t, n, f, v = SMALL.tokens, SMALL.hidden, SMALL.feed_forward, SMALL.vocabulary
    assert cases["rms_norm backward, residual, norm again"].work == 5 * t * n * 4
    assert cases["gated_activation forward"].work == 3 * t * f * 4
    assert cases["linear_cross_entropy"].work == 4 * t * n * v
    assert cases["linear_group gate_up: x W^T"].work == 2 * t * n * 2 * f
    causal = 2 * 2 * (t // 2) ** 2 * 4 * 16  # two documents, two products of half a square
    assert cases["attention forward, cuDNN, 2 documents"].work == causal


def test_rates_are_shares_of_the_ceiling_of_their_unit(tmp_path: Path) -> None:
    ceilings = {"TB/s": 4.0, "TFLOP/s": 800.0}
    moved = judge("copy", "1", 3e9, "TB/s", 1.0, ceilings, (2.0, None), "liger", ("GPU", "torch 2", "abc"))
    assert (moved.achieved, moved.share, moved.eager_ms, moved.rival, moved.rival_ms) == (3.0, 0.75, 2.0, "", None)
    assert judge("mm", "1", 4e11, "TFLOP/s", 1.0, ceilings, (None, 1.0), "x", ("GPU", "", "")).share == 0.5
    write(tmp_path / "micro.csv", [moved])
    (line,) = csv.DictReader((tmp_path / "micro.csv").read_text().splitlines())
    assert line["kernel"] == "copy"
    assert set(line) == set(Timing.__dataclass_fields__)


def test_the_program_times_every_case_and_says_which_failed(
    cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def take(run: Run) -> float:
        if run is cases["nf4 dequantize"].run:
            raise RuntimeError("no such kernel")
        if run is cases["flat_adamw"].rival:
            raise TypeError("another version")
        return 0.5

    monkeypatch.setattr(micro, "median_ms", take)
    monkeypatch.setattr(micro, "measure_ceilings", lambda: {"TB/s": 4.0, "TFLOP/s": 800.0})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended")
    monkeypatch.setattr(micro_cases, "all_cases", lambda sizes: iter(cases.values()))
    assert micro.main(["--output", str(tmp_path / "micro.csv"), "--commit", "abc"]) == 1
    said = capsys.readouterr().out
    assert "failed: nf4 dequantize" in said
    assert "another version" in said
    lines = {line["kernel"]: line for line in csv.DictReader((tmp_path / "micro.csv").read_text().splitlines())}
    assert set(lines) == set(cases) - {"nf4 dequantize"}
    assert lines["flat_adamw"]["rival_ms"] == ""
    assert lines["flat_adamw"]["commit"] == "abc"
