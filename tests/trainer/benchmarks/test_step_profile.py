"""A step's time by category, from kernels that a step on an H200 had."""

import pytest

from speed.step_profile import Span, by_category, category, gaps, totals

NAMES = {
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "large products",
    "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT": "large products",
    "nvjet_sm90_tst_32x64_64x16_1x2_h_bz_splitK_NTN": "small products",
    "nvjet_sm90_tst_128x256_64x4_2x1_v_badd_coopA_TNN": "small products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "small products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": "attention",
    "void kOptimizerStatic8bit2StateBlockwise<__nv_bfloat16>": "optimiser",
    "Memset (Device)": "copies",
    "_decode": "decoding",
    "_backward": "element-wise",
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_a_kernel_belongs_to_one_category(name: str, expected: str) -> None:
    assert category(name) == expected


def test_the_longest_gap_comes_first_and_follows_the_kernel_that_ended_last() -> None:
    spans = [Span("long", 0, 30), Span("short", 5, 10), Span("a", 40, 50), Span("b", 50, 60), Span("c", 90, 95)]
    assert gaps(reversed(spans)) == [("b", "c", pytest.approx(0.030)), ("long", "a", pytest.approx(0.010))]


def test_times_are_added_and_gaps_are_idle() -> None:
    spans = [Span("_decode", 0, 10), Span("_backward", 5, 20), Span("_backward", 50, 60), Span("_decode", 52, 55)]
    assert totals(spans) == [("_backward", 2, 0.025), ("_decode", 2, 0.013)]
    assert gaps(spans) == [("_backward", "_backward", pytest.approx(0.030))]
    assert by_category(spans) == pytest.approx({"element-wise": 0.025, "decoding": 0.013, "idle": 0.030})
