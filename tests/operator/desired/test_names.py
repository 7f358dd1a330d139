"""Names, labels and owners of children."""

import re
from typing import Any

import pytest

from finetune_api.job import ObjectMeta
from finetune_operator.desired.names import (
    child_labels,
    child_metadata,
    child_name,
    controller_uid,
    preflight_name,
)
from finetune_operator.desired.trainer_job import build_trainer_job
from finetune_test_operator.snapshot_builder import (
    INSTALLATION,
    METADATA,
    a_spec,
)


def _job(**sections: Any) -> dict[str, Any]:
    return build_trainer_job(METADATA, a_spec(**sections), INSTALLATION.trainer_image, "config")


NAMES = ["a", "bot", "a.b.c", "x" * 63, "x" * 57 + "-yyyyy", "1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_childs_name_fits_a_label_and_a_pods_name(name: str) -> None:
    for child in (child_name(ObjectMeta(name=name, uid="u")), preflight_name(ObjectMeta(name=name, uid="u"))):
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", child)
        assert len(child) <= 63


def test_a_job_made_again_has_other_children() -> None:
    assert child_name(ObjectMeta(name="bot", uid="1")) != child_name(ObjectMeta(name="bot", uid="2"))


def test_children_are_owned_and_labelled() -> None:
    metadata = child_metadata(METADATA, child_name(METADATA), "trainer")
    assert controller_uid(metadata) == METADATA.uid
    assert metadata["ownerReferences"][0]["blockOwnerDeletion"] is True
    assert metadata["labels"] == child_labels(METADATA, "trainer") == _job()["spec"]["template"]["metadata"]["labels"]
