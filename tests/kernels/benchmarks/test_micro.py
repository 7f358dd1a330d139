"""Every case of the kernels' benchmark runs (small, in Triton's interpreter), and costs what its formula says."""

import csv
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from benchmarks import micro
from benchmarks.micro import makers
from benchmarks.micro_case import Case, Maker, Run, Sizes
from benchmarks.micro_results import SHOWN, Machine, Milliseconds, Timing, judge, read, section, write
from finetune_kernels.ops.rotary_embedding import Heads
from finetune_test_kernels.tensor_checks import root_error
from speed.charts.tables import benchmarks_page

SMALL = Sizes(
    tokens=32, hidden=64, feed_forward=128, heads=Heads(4, 2, 16), softcap_heads=Heads(4, 2, 16), vocabulary=96, rank=4,
    layers=1,
    dtype=torch.float32, device="cpu",
)  # fmt: skip
KERNELS = {
    "rms_norm", "rotary_embedding", "gated_activation", "adapted_activation", "linear_group", "linear_cross_entropy",
    "blocked_cross_entropy", "nf4", "byte_product", "attention", "capped_attention", "flat_adamw", "adapter_dropout",
}  # fmt: skip
Cases = dict[tuple[str, str], Case]


@pytest.fixture(scope="module")
def cases() -> Iterator[Cases]:
    """The cases by kernel and direction."""
    torch.manual_seed(0)
    found = [case for make in makers().values() for case in make(SMALL)]
    yield {(case.kernel, case.direction): case for case in found}
    assert len({(case.kernel, case.direction) for case in found}) == len(found)


def test_every_kernel_is_timed_both_ways(cases: Cases) -> None:
    assert {re.split("[ ,]", name)[0] for name, _ in cases} == KERNELS
    assert {case.unit for case in cases.values()} == {"TB/s", "TFLOP/s"}
    both = {"rms_norm", "rotary_embedding", "gated_activation", "adapted_activation", "linear_group qkv",
            "capped_attention"}  # fmt: skip
    assert both <= {name for name, way in cases if way == "forward"} & {
        name for name, way in cases if way == "backward"
    }
    assert set(SHOWN) <= {name for name, _ in cases}


def test_every_case_runs_and_so_does_what_stands_beside_it(cases: Cases) -> None:
    for case in cases.values():
        for run in (case.run, case.eager, case.rival):
            if run is not None:
                run()
                run()  # do_bench calls again and again


def test_eager_computes_the_same(cases: Cases) -> None:
    for name in (("rms_norm, residual", "forward"), ("gated_activation", "backward"), ("adapted_activation", "forward"),
                 ("linear_cross_entropy", "both"), ("attention, cuDNN, 2 documents", "backward"),
                 ("capped_attention, window", "backward")):  # fmt: skip
        case = cases[name]
        assert case.eager is not None
        ours, eager = case.run(), case.eager()
        if name == ("rms_norm, residual", "forward"):
            ours = ours[1]
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, eager)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gathered_values_are_those_that_are_loaded(cases: Cases) -> None:
    ours, other = (cases[name, "forward"].run for name in ("nf4 decoding", "nf4 decoding, gathered values"))
    expected = ours().clone()
    ours().zero_()
    assert torch.equal(other(), expected)
    assert expected.any()


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize(("kind", "most"), [("E4M3", 0.045), ("int8", 0.015)])
def test_products_of_bytes_are_near_those_of_16_bits(cases: Cases, kind: str, most: float, way: str) -> None:
    """As near as tests/kernels/primitives/byte_products measure."""
    case, other = (cases[f"byte_product {name}, {kind}", way] for name in ("qkv", "o"))
    assert case.eager is not None
    assert other.eager is not None
    assert 0 < root_error(case.run(), case.eager()) < most
    assert root_error(other.run(), other.eager().flip(0)) > 1


def test_bytes_and_operations_are_those_of_the_formulas(cases: Cases) -> None:
    t, n, f, v = SMALL.tokens, SMALL.hidden, SMALL.feed_forward, SMALL.vocabulary
    assert cases["rms_norm, residual", "backward"].work == 5 * t * n * 4
    assert cases["gated_activation", "forward"].work == 3 * t * f * 4
    assert cases["linear_cross_entropy", "both"].work == cases["blocked_cross_entropy", "both"].work == 4 * t * n * v
    assert cases["linear_group gate_up", "forward"].work == 2 * t * n * 2 * f
    causal = 2 * 2 * (t // 2) ** 2 * 4 * 16  # two documents, two products of half a square
    assert cases["attention, cuDNN, 2 documents", "forward"].work == causal
    pairs = sum(min(row + 1, t // 4) for row in range(t))
    windowed = cases["capped_attention, window", "forward"].work / (4 * 4 * 16)
    assert windowed == pytest.approx(pairs, rel=0.02)  # the diagonal counts half


def test_rates_are_shares_of_the_ceiling_of_their_unit(tmp_path: Path) -> None:
    machine = Machine({"TB/s": 4.0, "TFLOP/s": 800.0}, "GPU", "torch 2", "abc")
    copy = Case("copy", "forward", "1", 3e9, "TB/s", lambda: None, rival_name="liger")
    moved = judge(copy, Milliseconds(1.0, eager=2.0), machine)
    assert (moved.microseconds, moved.achieved, moved.share) == (1000, 3.0, 0.75)
    assert (moved.eager_microseconds, moved.rival, moved.rival_microseconds) == (2000, "", None)

    product = Case("mm", "both", "1", 4e11, "TFLOP/s", lambda: None, rival_name="x")
    made = judge(product, Milliseconds(1.0, rival=1.0), machine)
    assert (made.share, made.rival_microseconds) == (0.5, 1000)

    write(tmp_path / "micro.csv", [moved, made])
    (line, _) = csv.DictReader((tmp_path / "micro.csv").read_text().splitlines())
    assert line["kernel"] == "copy"
    assert set(line) == set(Timing.__dataclass_fields__)
    assert read(tmp_path / "micro.csv") == [moved, made]
    assert read(tmp_path / "none.csv") == []


def test_the_readme_shows_what_was_measured_and_nothing_before(cases: Cases) -> None:
    machine = Machine({"TB/s": 4.0, "TFLOP/s": 800.0}, "NVIDIA X", "torch 2", "abc")
    timings = [judge(replace(one, work=2e9), Milliseconds(1.0), machine) for one in cases.values()]

    lines = section(timings)
    assert "| rms_norm | 1,000 us | 2.00 TB/s, 50% | 1,000 us | 2.00 TB/s, 50% |" in lines
    assert "| linear_cross_entropy | 1,000 us | 2 TFLOP/s, 0% |  |  |" in lines
    assert sum(line.startswith("| ") for line in lines) == 1 + len(SHOWN)
    assert not [line for line in lines if "x A^T" in line]
    assert section([]) == []
    assert benchmarks_page([], timings).endswith("\n".join(lines[:-1]) + "\n")
    assert "NVIDIA X" not in benchmarks_page([], [])


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, cases: Cases) -> None:
    """A GPU on which every call takes half a millisecond, but for two that fail."""

    def take(run: Run) -> float:
        if run is cases["nf4 decoding", "forward"].run:
            raise RuntimeError("no such kernel")
        if run is cases["flat_adamw", "step"].rival:
            raise TypeError("another version")
        return 0.5

    def broken(_: Sizes) -> Iterator[Case]:
        yield next(iter(cases.values()))
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(micro, "median_ms", take)
    monkeypatch.setattr(micro, "measure_ceilings", lambda: {"TB/s": 4.0, "TFLOP/s": 800.0})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended")
    everything: dict[str, Maker] = {"broken": broken, "all": lambda sizes: iter(list(cases.values())[1:])}
    monkeypatch.setattr(micro, "makers", lambda: everything)


@pytest.mark.usefixtures("pretended")
def test_the_program_times_every_case_and_says_which_failed(
    cases: Cases, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert micro.main(["--output", str(tmp_path / "micro.csv"), "--commit", "abc"]) == 1
    said = capsys.readouterr().out
    assert "failed: broken, nf4 decoding forward" in said
    assert "shared memory" in said
    assert "another version" in said
    lines = {(one.kernel, one.direction): one for one in read(tmp_path / "micro.csv")}
    assert set(lines) == set(cases) - {("nf4 decoding", "forward")}
    assert lines["flat_adamw", "step"].rival_microseconds is None
    assert lines["flat_adamw", "step"].commit == "abc"


@pytest.mark.usefixtures("pretended")
def test_the_program_ends_when_its_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert micro.main(["--output", str(tmp_path / "micro.csv"), "--commit", "abc", "--seconds", "0"]) == 1
    assert "no time was left for all of: broken, all" in capsys.readouterr().out
    assert not (tmp_path / "micro.csv").exists()
