"""A pod's last word is believed only as far as it names what this pod can have written."""

import pytest

from finetune_api.outcome import Artifact, Outcome, Result
from finetune_api.preflight import PreflightSummary
from finetune_api.vocabulary import ArtifactType
from finetune_operator.observe.doubts import find_doubt
from finetune_test_operator.snapshot_builder import LOCATION, METADATA, NOW, POD

OWN = f"{LOCATION}attempts/{METADATA.uid}.{POD}/"
MANIFEST = f"{LOCATION}manifest.json"


def an_outcome(
    artifact: str = f"{OWN}gguf/bot-Q8_0.gguf", manifest: str | None = MANIFEST, *, reused: bool = False
) -> Outcome:
    made = Artifact(type=ArtifactType.GGUF, uri=artifact, bytes=1, sha256="a" * 64, format="gguf")
    return Outcome(result=Result.SUCCEEDED, manifest_uri=manifest, artifacts=(made,), reused=reused, finished=NOW)


BELIEVED = {
    "its own": an_outcome(),
    "a folder of its own": an_outcome(f"{OWN}adapter/"),
    "a result that was there already": an_outcome(f"{LOCATION}attempts/former.pod/gguf/a.gguf", reused=True),
    "no result": Outcome(result=Result.FAILED, finished=NOW),
    "checks": Outcome(
        result=Result.SUCCEEDED, preflight=PreflightSummary(report_uri=f"{LOCATION}preflight/report.html"), finished=NOW
    ),
}
DOUBTED = {
    "another bucket": an_outcome(manifest="s3://evil/team/bot/manifest.json"),
    "another job's place": an_outcome(manifest="s3://results/team/bot-2/manifest.json"),
    "another file": an_outcome(manifest=f"{LOCATION}attempts/x/manifest.json"),
    "a disguised place": an_outcome(manifest=f"{LOCATION}manifest.json/../../victim/manifest.json"),
    "an artifact elsewhere": an_outcome("s3://evil/model.gguf"),
    "another pod's attempt": an_outcome(f"{LOCATION}attempts/{METADATA.uid}.pod-2/gguf/a.gguf"),
    "another job's attempt": an_outcome(f"{LOCATION}attempts/other.{POD}/gguf/a.gguf"),
    "an artifact that climbs": an_outcome(f"{OWN}../../../victim/attempts/a.gguf"),
    "a reused result that climbs": an_outcome(f"{LOCATION}attempts/../../victim/a.gguf", reused=True),
    "a reused result elsewhere": an_outcome("s3://evil/attempts/a.gguf", reused=True),
    "success without a result": Outcome(result=Result.SUCCEEDED, finished=NOW),
    "a report elsewhere": Outcome(
        result=Result.SUCCEEDED, preflight=PreflightSummary(report_uri="https://evil.example/report.html"), finished=NOW
    ),
}


@pytest.mark.parametrize("outcome", BELIEVED.values(), ids=BELIEVED)
def test_what_a_pod_can_have_written_is_believed(outcome: Outcome) -> None:
    assert find_doubt(outcome, LOCATION, METADATA.uid, {POD}) is None


@pytest.mark.parametrize("outcome", DOUBTED.values(), ids=DOUBTED)
def test_what_leads_elsewhere_is_not(outcome: Outcome) -> None:
    assert find_doubt(outcome, LOCATION, METADATA.uid, {POD}) is not None


def test_a_pod_may_report_the_attempt_that_committed_first() -> None:
    earlier = an_outcome(f"{LOCATION}attempts/{METADATA.uid}.pod-0/gguf/a.gguf")
    assert find_doubt(earlier, LOCATION, METADATA.uid, {"pod-0", POD}) is None


def test_a_forged_address_is_cut() -> None:
    doubt = find_doubt(an_outcome(manifest="s3://evil/" + "x" * 2000), LOCATION, METADATA.uid, {POD})
    assert doubt is not None
    assert doubt.startswith("the pod says that the job wrote s3://evil/xxx")
    assert len(doubt) < 400
