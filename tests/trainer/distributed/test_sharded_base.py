"""A base that the ranks share out decodes to the same bits, and trains the same curve, as one that each keeps whole."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.run_config import RunConfig

Builder = Callable[..., RunConfig]
TRAINING = {
    "maxSteps": 3, "precision": "FP32", "optimizer": "AdamW", "evaluationSteps": 3, "loggingSteps": 1, "batchSize": 2,
    "gradientAccumulation": 2,
}  # fmt: skip
# An odd number of rows to evaluate on, and a last step with a single row: one rank has less to do than the other.
DATA = {"evaluation": {"fraction": 0.275}, "packing": False}


@pytest.fixture
def found(tmp_path: Path, run_config: Builder) -> dict[str, Any]:
    """What two processes found: bits, curves and controls."""
    config = run_config(training=TRAINING, dataset=DATA)
    (tmp_path / "config.json").write_text(config.model_dump_json(by_alias=True), encoding="utf-8")

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [*torchrun, "-m", "finetune_test_models.ranks.sharded", str(tmp_path / "config.json"), str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-P", *program],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr.partition("multiprocessing.api:failed")[0][-4000:]
    return json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def largest_difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative difference of losses, evaluations and norms."""
    pairs = [
        (found[kind][step], value)
        for kind in ("losses", "evaluations", "norms")
        for step, value in expected[kind].items()
    ]
    assert len(pairs) == 3 + 1 + 3
    return max(abs(one - other) / abs(other) for one, other in pairs)


def test_a_shared_base_decodes_to_the_same_bits_and_gives_the_same_curve(found: dict[str, Any]) -> None:
    differing, total = found["bits"]
    assert (differing, total > 100_000) == (0, True)
    assert found["wrong_bits"][0] > total / 2, "parts in the wrong order are seen"

    # The same numbers in the same order: not a rounding apart.
    assert largest_difference(found["shared"], found["whole"]) == 0
    wrong = largest_difference(found["wrong"], found["whole"])
    print("parts in the wrong order:", wrong)
    assert wrong > 1e-3

    # Half of the layers, and all of the vocabulary and the norms.
    whole, shared = found["kept"]
    vocabulary_and_norms = 4 * (2 * 512 * 256 + 5 * 256)
    print("bytes kept:", whole, shared)
    assert shared < whole / 2 + vocabulary_and_norms
