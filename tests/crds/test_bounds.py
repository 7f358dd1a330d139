"""Whatever a pod says and the models accept makes a status that the real API server accepts."""

import json
import zlib
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kubernetes import client
from pydantic import ValidationError

from finetune_api.base import Json
from finetune_api.outcome import COMPRESSED_PREFIX, Outcome
from finetune_api.progress import ProgressReport
from finetune_api.status import MAX_STATUS_BYTES
from finetune_devcluster.cluster import DevCluster
from finetune_operator.observe.report_store import ReceivedReport
from finetune_operator.status.status import build_status
from finetune_test_operator.snapshot_builder import NOW, POD, a_running_pod, a_snapshot, an_ended_pod, decision_about

NUMBERS = (0, 1, -1, 100, 2**31, 2**53 - 1, 2**53, 2**63, 10**30, 0.5, 1e308, 5e-324, -0.0, 1e16)
TIMES = ("2026-11-24T00:00:00Z", "1970-01-01T00:00:00+00:00", "9999-12-31T23:59:59.999999-23:59", "2026-11-24T00:00:00",
         "0001-01-01T00:00:00Z", 0, 1e11)  # fmt: skip
TEXTS = ("", "x", "\0", "é" * 256, "x" * 257, "\N{PARTY POPPER}" * 2048, "x" * 5000, "s3://b/k", "a" * 64)


def documents(schema: Json, definitions: Json) -> st.SearchStrategy[Any]:
    """Documents of about a JSON schema: of its shape and its words, with values in and out of its bounds."""
    if "$ref" in schema:
        return documents(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    if "anyOf" in schema:
        return st.one_of([documents(each, definitions) for each in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])

    kind = schema["type"]
    if kind == "object":
        fields = {name: documents(field, definitions) for name, field in schema["properties"].items()}
        required = {name: fields[name] for name in schema.get("required", ())}
        return st.fixed_dictionaries(required, optional={k: v for k, v in fields.items() if k not in required})
    if kind == "array":
        return st.lists(documents(schema["items"], definitions), max_size=3)
    if kind == "string":
        return st.sampled_from(TIMES) if schema.get("format") == "date-time" else st.sampled_from(TEXTS)
    return {"boolean": st.booleans(), "null": st.none()}.get(kind, st.sampled_from(NUMBERS))


def accepted(model: Any) -> st.SearchStrategy[Any]:
    """Instances of a model, from documents that it accepts: each leaf that it refuses is left out."""
    schema = model.model_json_schema(by_alias=True)
    return documents(schema, schema.get("$defs", {})).map(lambda document: _mended(model, document)).filter(bool)


def _mended(model: Any, document: Json) -> Any:
    for _ in range(40):
        try:
            return model.model_validate_json(json.dumps(document))
        except ValidationError as error:
            _repair(document, error.errors()[0]["loc"])
    return None


def _repair(document: Any, place: tuple[Any, ...]) -> None:
    """Put a plain value where one was refused, or leave it out."""
    for step in place[:-1]:
        document = document[step]
    plain = {
        "startTime": TIMES[0],
        "endTime": TIMES[0],
        "lastUpdatedTime": TIMES[0],
        "finished": TIMES[0],
        "sha256": "a" * 64,
        "name": "x",
    }

    if not place or not isinstance(document, dict | list):
        return
    if place[-1] == "stages" or isinstance(document, list):
        document[place[-1]] = []
    else:
        document[place[-1]] = plain.get(place[-1], 1 if isinstance(document.get(place[-1]), int | float) else "x")


@pytest.fixture
def try_status(crd_cluster: DevCluster, jobs: Any, minimal: Json, namespace: str) -> Callable[[Json], None]:
    """Writes a status to the API server, which checks it and stores nothing; raises if it is refused."""
    assert jobs.apply(minimal) == ""
    api: Any = client.CustomObjectsApi(crd_cluster.api_client())

    def write(status: Json) -> None:
        place = ("finetune.dev", "v1alpha1", namespace, "finetunejobs", "tried")
        api.patch_namespaced_custom_object_status(*place, {"status": status}, dry_run="All")

    return write


SETTINGS = settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)  # fmt: skip


@SETTINGS
@given(report=accepted(ProgressReport))
def test_every_report_that_is_accepted_can_be_stored(try_status: Any, report: ProgressReport) -> None:
    snapshot = a_snapshot(pods=(a_running_pod(),), report=ReceivedReport(POD, NOW, report))
    status = build_status(snapshot, decision_about(snapshot)).to_wire()
    assert len(json.dumps(status, ensure_ascii=False).encode()) <= MAX_STATUS_BYTES
    try_status(status)


@SETTINGS
@given(outcome=accepted(Outcome))
def test_every_outcome_that_is_accepted_can_be_stored(try_status: Any, outcome: Outcome) -> None:
    snapshot = a_snapshot(pods=(an_ended_pod(0),))
    decision = replace(decision_about(snapshot), outcome=outcome, message=outcome.message)
    try_status(build_status(snapshot, decision).to_wire())


def packed(message: str, **fields: Any) -> str:
    """A compressed outcome, as a forger would write it."""
    text = json.dumps({"result": "Failed", "finished": TIMES[0], "message": message} | fields)
    return COMPRESSED_PREFIX + b64encode(zlib.compress(text.encode(), 9)).decode()


def test_the_bound_of_an_outcome_counts_what_is_decompressed() -> None:
    assert len(packed("x" * 10**6)) < 2048
    assert Outcome.decode(packed("x" * 5000)).message.endswith("x…")
    with pytest.raises(ValueError, match="the outcome has more than"):
        Outcome.decode(packed("x" * 10**6))
    with pytest.raises(ValueError, match="step"):
        Outcome.decode(packed("x", step=10**30))
