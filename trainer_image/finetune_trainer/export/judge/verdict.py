"""Verdict on published weights: the share of the training that they keep, and when that is worth a warning. Pure.

The measure is the improvement that training brought on some rows, base loss less trained loss:

    kept = (base loss - loss of the weights) / (base loss - loss of the trained model)
"""

import math
from collections.abc import Mapping

ENOUGH = 0.8
"""Share of the improvement from which on nothing is said. Files of a small model that was taught a format keep 0.999 as
Q4_K_M and 0.97 as Q2_K; a base that was on Q4_K's grid before training keeps 0.03 to 0.17 as Q4_K_M, because rounding
brings its weights back to where they were (tests/trainer/test_judged_runs.py)."""
MEASURABLE = 0.01
"""Nats of improvement below which a share means nothing: in 16 bits, losses differ by a thousandth from one order of
the same sums to another."""
MUCH = 0.1
"""Nats by which weights may lie above the trained model where training brought no measurable improvement: ten percent
of perplexity, which 4-bit files of healthy models do not lose."""


def improvement_kept(base: float, trained: float, found: float) -> float | None:
    """The share of the improvement that weights of loss `found` keep; None if there is none that can be measured."""
    gain = base - trained
    if not (math.isfinite(gain) and math.isfinite(found)) or gain < MEASURABLE:
        return None
    return round((base - found) / gain, 4)


def has_lost(base: float, trained: float, found: float) -> bool:
    """True if weights of loss `found` deserve a warning: they lost the training, or compute nothing sensible."""
    if not math.isfinite(found):
        return True
    kept = improvement_kept(base, trained, found)
    return kept < ENOUGH if kept is not None else found - trained > MUCH


def warn_of_files(base: float, trained: float, files: Mapping[str, float], rows: str) -> str | None:
    """A sentence about the GGUF files, by type, that lost the training; None if all are well. `rows` names the rows."""
    lost = [_describe(kind, base, trained, loss) for kind, loss in files.items() if has_lost(base, trained, loss)]
    if not lost:
        return None
    return (
        f"GGUF files lost part of the training: {', '.join(lost)}; on {rows} the base has loss {base:.4f}, the merged "
        f"model {trained:.4f}: take a type of more bits (Q8_0, F16), or serve the adapter"
    )


def warn_of_merged(base: float, adapter: float, merged: float, rows: str) -> str | None:
    """A sentence about merged weights that lost what the adapter learned on the base as it was loaded."""
    if not has_lost(base, adapter, merged):
        return None
    return (
        f"merged weights lost part of the training: {_describe('they', base, adapter, merged)}; on {rows} the base has "
        f"loss {base:.4f}, the adapter as it was trained {adapter:.4f}: serve the adapter"
    )


def _describe(name: str, base: float, trained: float, found: float) -> str:
    if not math.isfinite(found):
        return f"{name} (loss is not a number)"
    kept = improvement_kept(base, trained, found)
    share = f"keeps {max(0.0, kept):.0%}, " if kept is not None else ""
    return f"{name} ({share}loss {found:.4f})"
