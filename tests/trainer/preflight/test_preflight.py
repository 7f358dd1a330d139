"""Whole preflights of real files: what stops a job, all together, and what the report shows of hostile rows."""

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune_api.outcome import Outcome
from finetune_api.run_config import RunConfig
from finetune_devcluster.object_store import ObjectStore
from finetune_trainer.preflight.checks import run_preflight
from finetune_trainer.preflight.command import preflight_attempt
from finetune_trainer.preflight.report import Report
from finetune_trainer.settings import Settings

Build = Callable[..., RunConfig]
INJECTION = '</pre><script>alert(1)</script><img src="https://evil.example/x" onerror=alert(2)>'


def row(answer: str = "yes", question: str = "why?", role: str = "assistant") -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": role, "content": answer}]})


def dataset(tmp_path: Path, *lines: str) -> dict[str, Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    return {"source": f"file://{path}"}


def errors(report: Report) -> list[tuple[str, str]]:
    return [(finding.place, str(finding.reason)) for finding in report.errors()]


def test_a_good_job_has_a_report(run_config: Build, settings: Settings) -> None:
    report, written = run_preflight(run_config(), settings)
    assert errors(report) == []
    assert report.rows is not None
    assert (report.rows.total, report.rows.bad) == (40, 0)
    assert report.optimizer_steps == 3
    assert report.architecture == "LlamaForCausalLM"
    assert [Path(uri).name for uri in written] == ["report.html", "report.json"]
    assert Report.model_validate_json(Path(written[1]).read_text()) == report
    assert any(span.supervised for span in report.samples[0].spans)
    assert not any(path.suffix == ".safetensors" for path in settings.work.rglob("*"))


def test_every_error_comes_at_once(run_config: Build, settings: Settings, tmp_path: Path) -> None:
    lines = dataset(tmp_path, row(), row(role="robot"), "{", row(answer=" "))
    config = run_config(model={"source": f"file://{tmp_path}/absent"}, dataset=lines)
    blocked = tmp_path / "file"
    blocked.touch()
    report, written = run_preflight(config, replace(settings, output_folder=blocked))
    found = errors(report)
    assert found[:2] == [("spec.output.s3", "StorageNotWritable"), ("spec.model.source", "ModelNotFound")]
    assert found[2:] == [(f"rows.jsonl:{number}", "InvalidRow") for number in (2, 3, 4)]
    assert written == ()


def test_bad_rows_only_warn_where_they_are_skipped(run_config: Build, settings: Settings, tmp_path: Path) -> None:
    lines = dataset(tmp_path, row(), row(role="robot")) | {"onBadRow": "Skip"}
    report, _ = run_preflight(run_config(dataset=lines), settings)
    assert errors(report) == []
    assert report.warnings()[0].place == "rows.jsonl:2"


def test_rows_to_evaluate_on_are_checked_too(run_config: Build, settings: Settings, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("\n".join([row(), row(role="robot")]))
    lines = dataset(tmp_path, row(), row("no"))
    report, _ = run_preflight(
        run_config(dataset=lines | {"maxSamples": 1, "evaluation": {"source": f"file://{held_out}"}}), settings
    )
    assert errors(report) == [("held-out.jsonl:2", "InvalidRow")]
    assert report.rows is not None
    assert report.rows.total == 1, "they are not among the rows that train"
    absent = {"evaluation": {"source": f"file://{tmp_path}/absent.jsonl"}}
    report, _ = run_preflight(run_config(dataset=lines | absent), settings)
    assert errors(report) == [("spec.dataset.evaluation", "DatasetNotFound")]


def test_rows_without_supervised_tokens_are_an_error(run_config: Build, settings: Settings, tmp_path: Path) -> None:
    lines = dataset(tmp_path, *[row(question="x " * 500)] * 3)
    report, _ = run_preflight(run_config(dataset=lines), settings)
    assert errors(report) == [("spec.dataset.trainOn", "NoSupervisedTokens")]
    assert report.rows is not None
    assert report.rows.duplicates == 2


class Tags(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_a_row_with_html_stays_text(run_config: Build, settings: Settings, tmp_path: Path) -> None:
    lines = dataset(tmp_path, row(), row(answer=INJECTION), row(role=INJECTION)) | {"onBadRow": "Skip"}
    config = run_config(dataset=lines, model={"maxSequenceLength": 512})
    _, written = run_preflight(config, settings)
    page, tags = Path(written[0]).read_text(), Tags()
    tags.feed(page)
    assert "&lt;script&gt;alert(1)" in page
    assert not tags.names & {"script", "img", "link", "iframe", "object"}
    assert not {name for name in tags.attributes if name.startswith("on") or name in ("src", "href")}
    assert {"svg", "mark"} <= tags.names
    control = Tags()
    control.feed(INJECTION)
    assert {"script", "img"} <= control.names


@pytest.mark.parametrize(("exists", "code"), [(True, 0), (False, 15)], ids=["bucket", "no bucket"])
def test_the_report_goes_to_s3_and_the_outcome_to_the_pod(
    exists: bool, code: int, run_config: Build, settings: Settings, tmp_path: Path, object_store: ObjectStore
) -> None:
    bucket = f"preflight-{exists}".lower()
    if exists:
        object_store.create_bucket(bucket)
    keys = tmp_path / "credentials/output"
    keys.mkdir(parents=True)
    (keys / "AWS_ACCESS_KEY_ID").write_text(object_store.access_key)
    (keys / "AWS_SECRET_ACCESS_KEY").write_text(object_store.secret_key)
    config = run_config(output={"s3": {"bucket": bucket, "endpointURL": object_store.endpoint_url}})
    mounted, message = tmp_path / "run_config.yaml", tmp_path / "termination"
    mounted.write_text(config.to_yaml())
    place = replace(settings, output_folder=None, credentials=keys.parent, config=mounted, termination_log=message)
    assert preflight_attempt(place) == code
    outcome = Outcome.decode(message.read_text())
    if exists:
        listed = object_store.client().list_objects_v2(Bucket=bucket)["Contents"]
        assert {entry["Key"] for entry in listed} == {
            f"default/tiny/preflight/report.{kind}" for kind in ("html", "json")
        }
        assert "tokens per row: p50" in outcome.message
    else:
        assert outcome.reason == "BucketNotFound"
