"""The list of series: documented, well named, and bounded."""

import sys
from pathlib import Path

from finetune_operator.metrics import series
from finetune_operator.metrics.job_gauges import JOBS

CHECKOUT = Path(__file__).parents[3]
BOUNDED = {
    "phase",
    "reason",
    "state",
    "stream",
    "verb",
    "code",
    "result",
    "stage",
    "type",
    "version",
    "python",
    "currency",
}


def test_the_page_is_fresh() -> None:
    sys.path.insert(0, str(CHECKOUT / "tests/repository"))
    from metrics_table import page

    assert (CHECKOUT / "docs/metrics.md").read_text() == page(), "run `make generate`"


def test_there_are_enough_series_and_all_are_ours() -> None:
    families = {family.name: family for family in series.REGISTRY.collect()}
    assert len(families) >= 20
    assert all(name.startswith("finetune_") for name in families)
    assert all(family.documentation.endswith(".") for family in families.values())
    assert {family.name for family in JOBS.collect()} <= families.keys()


def test_labels_are_bounded() -> None:
    labels = {label for each in vars(series).values() for label in getattr(each, "_labelnames", ())}
    labels |= {label for family in JOBS.collect() for label in getattr(family, "_labelnames", ())}
    assert labels <= BOUNDED, "a label whose values nobody bounds makes a series for each"
