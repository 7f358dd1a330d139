"""Whole preflights of real files: what stops a job, all together, and what the report shows of hostile rows."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune_api.gpus import ExpectedGpu
from finetune_api.outcome import Outcome
from finetune_api.run_config import RunConfig
from finetune_test_servers.s3_server import S3Server
from finetune_trainer.cli.preflight import preflight_attempt, to_outcome
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.preflight.checks import run_preflight
from finetune_trainer.preflight.report import Finding, Report, Severity
from finetune_trainer.preflight.table import facts

Build = Callable[..., RunConfig]
INJECTION = '</pre><script>alert(1)</script><img src="https://evil.example/x" onerror=alert(2)>'


def row(answer: str = "yes", question: str = "why?", role: str = "assistant") -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": role, "content": answer}]})


def dataset(tmp_path: Path, *lines: str) -> dict[str, Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    return {"source": f"file://{path}"}


def errors(report: Report) -> list[tuple[str, str]]:
    return [(finding.location, str(finding.reason)) for finding in report.errors()]


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


def test_a_layer_that_the_model_does_not_have_is_found_by_the_names_of_its_weights(
    run_config: Build, settings: Settings
) -> None:
    known = run_config(adapter={"targetModules": ["q_proj", "up_proj"]})
    assert errors(run_preflight(known, settings)[0]) == []
    report, _ = run_preflight(run_config(adapter={"targetModules": ["q_proj", "w1"]}), settings)
    assert errors(report) == [("spec.adapter.targetModules", "InvalidConfiguration")]
    layers = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert report.errors()[0].message == f"the model has no layer w1; choose from {layers}"


def test_coverage_is_in_the_report_and_the_table(run_config: Build, settings: Settings) -> None:
    report, written = run_preflight(run_config(adapter={"targetModules": ["q_proj"]}), settings)
    assert report.coverage is not None
    assert (report.coverage.quantized_share, report.coverage.stacked_bytes) == (1.0, 0)
    shares = f"{report.coverage.adapted_share:.1%} of the layers' weights"
    assert dict(facts(report))["with an adapter"] == shares
    assert shares in Path(written[0]).read_text().replace("&#39;", "'")
    assert report.warnings()[-1].location == "spec.adapter.targetModules"


@pytest.mark.parametrize(("quantization", "advised"), [("NF4", True), ("None", False)])
def test_a_cpu_run_is_advised_to_leave_nf4_out(
    run_config: Build, settings: Settings, quantization: str, advised: bool
) -> None:
    report, _ = run_preflight(run_config(model={"quantization": quantization}), settings)
    assert ("write spec.model.quantization: None" in dict(facts(report)).get("faster", "")) is advised


def cut_weights(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-2])


def name_a_shard(model: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "reason", "part"),
    [
        (cut_weights, "InvalidConfiguration", "model.safetensors broke off"),
        (name_a_shard, "ModelNotFound", "names model-00001-of-00001.safetensors, which the model's folder lacks"),
    ],
)
def test_weights_that_are_not_whole_are_found_without_reading_them(
    run_config: Build, settings: Settings, tiny_base: Path, tmp_path: Path,
    damage: Callable[[Path], None], reason: str, part: str,
) -> None:  # fmt: skip
    model = shutil.copytree(tiny_base, tmp_path / "model")
    damage(model)
    report, _ = run_preflight(run_config(model={"source": f"file://{model}"}), settings)
    assert errors(report) == [("spec.model.source", reason)]
    assert part in report.errors()[0].message


def test_bad_rows_only_warn_where_they_are_skipped(run_config: Build, settings: Settings, tmp_path: Path) -> None:
    lines = dataset(tmp_path, row(), row(role="robot")) | {"onBadRow": "Skip"}
    report, _ = run_preflight(run_config(dataset=lines), settings)
    assert errors(report) == []
    assert "rows.jsonl:2" in [warning.location for warning in report.warnings()]


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
    exists: bool, code: int, run_config: Build, settings: Settings, tmp_path: Path, s3_server: S3Server
) -> None:
    bucket = f"preflight-{exists}".lower()
    if exists:
        s3_server.create_bucket(bucket)
    keys = tmp_path / "credentials/output"
    keys.mkdir(parents=True)
    (keys / "AWS_ACCESS_KEY_ID").write_text(s3_server.access_key)
    (keys / "AWS_SECRET_ACCESS_KEY").write_text(s3_server.secret_key)
    config = run_config(output={"s3": {"bucket": bucket, "endpointURL": s3_server.endpoint_url}})
    mounted, message = tmp_path / "run_config.yaml", tmp_path / "termination"
    mounted.write_text(config.to_yaml())
    place = replace(settings, output_folder=None, credentials=keys.parent, config=mounted, termination_log=message)
    assert preflight_attempt(place, StopSignal()) == code
    outcome = Outcome.decode(message.read_text())
    assert outcome.stage == "Preflight"
    assert outcome.preflight is not None
    if exists:
        assert (outcome.preflight.rows, outcome.preflight.errors, outcome.preflight.steps) == (40, 0, 3)
        assert outcome.preflight.report_uri == f"s3://{bucket}/default/tiny/preflight/report.html"
        listed = s3_server.client().list_objects_v2(Bucket=bucket)["Contents"]
        assert {entry["Key"] for entry in listed} == {
            f"default/tiny/preflight/report.{kind}" for kind in ("html", "json")
        }
        assert "tokens per row: p50" in outcome.message
    else:
        assert outcome.reason == "BucketNotFound"
        assert (outcome.preflight.errors, outcome.preflight.report_uri) == (1, None)


def test_every_error_is_counted_and_fields_come_before_rows(
    run_config: Build, settings: Settings, tmp_path: Path
) -> None:
    lines = dataset(tmp_path, *[row(role="robot")] * 130, row())
    gpu = {"name": "small", "memoryBytes": 1}
    config = run_config(dataset=lines).model_copy(update={"gpu": ExpectedGpu.model_validate(gpu)})
    report, written = run_preflight(config, settings)
    outcome = to_outcome(report, written)
    assert (report.error_count(), len(report.errors())) == (131, 101)
    assert report.errors()[0].location == "spec.training.batchSize"
    assert outcome.reason == "CudaOutOfMemory"
    assert outcome.message.startswith("131 errors: spec.training.batchSize: ")
    assert "rows.jsonl:1: " in outcome.message
    assert "and 121 more" in outcome.message
    assert outcome.preflight is not None
    assert (outcome.preflight.errors, outcome.preflight.bad_rows) == (131, 130)
    page = Path(written[0]).read_text()
    assert "131 errors" in page
    assert "30 bad rows that are only counted" in page


def test_the_longest_outcome_fits_the_termination_message(run_config: Build, settings: Settings) -> None:
    report, written = run_preflight(run_config(), settings)
    warning = Finding(severity=Severity.WARNING, location="spec.dataset.source", message="\N{GRINNING FACE}" * 5000)
    outcome = to_outcome(report.model_copy(update={"findings": (warning,) * 50}), written)
    assert outcome.preflight is not None
    assert (len(outcome.preflight.warnings), outcome.preflight.warning_count) == (5, 50)
    assert len(outcome.encode().encode()) <= 4096
    assert Outcome.decode(outcome.encode()).preflight == outcome.preflight


WARNED: dict[str, tuple[list[Any], list[str]]] = {
    "reasoning under a key": (
        [{"role": "assistant", "content": "yes", "reasoning_content": "hm"}],
        ["spec.model.chatTemplate: the chat template leaves out the reasoning of 2 of 2 answers"],
    ),
    "a key that nothing reads": (
        [{"role": "assistant", "content": "yes", "mask": 0}],
        ["spec.dataset.source: keys of messages that nothing reads: 'mask' in 2 rows (rows.jsonl:1, rows.jsonl:2)"],
    ),
    "a flag that has its effect": (
        [{"role": "assistant", "content": "no", "loss": False}, {"role": "user"}, {"role": "assistant"}],
        [],
    ),
}


@pytest.mark.parametrize(("turns", "said"), WARNED.values(), ids=WARNED)
def test_what_would_be_lost_in_silence_is_a_warning(
    run_config: Build, settings: Settings, tmp_path: Path, turns: list[Any], said: list[str]
) -> None:
    lines = [
        json.dumps({"messages": [{"role": "user", "content": question}, *({"content": "x"} | turn for turn in turns)]})
        for question in ("why?", "how?")
    ]
    report, _ = run_preflight(run_config(dataset=dataset(tmp_path, *lines)), settings)
    found = [f"{finding.location}: {finding.message}" for finding in report.warnings()]
    lost = [text for text in found if "reason" in text or "nothing reads" in text]
    assert len(lost) == len(said)
    assert all(text.startswith(part) for text, part in zip(lost, said, strict=True))


REFUSING = "{{ raise_exception('not today') if messages[0].content != 'x' }}{{ messages[0].content }}"


def test_a_template_that_takes_no_row_is_to_blame(run_config: Build, settings: Settings, tmp_path: Path) -> None:
    config = run_config(dataset=dataset(tmp_path, row(), row()) | {"onBadRow": "Skip"})
    config = config.model_copy(update={"model": config.model.model_copy(update={"chat_template": REFUSING})})
    report, _ = run_preflight(config, settings)
    assert errors(report) == [("spec.model.chatTemplate", "InvalidChatTemplate")]
    assert "takes none of the rows; of the first it says: the chat template refuses the row: not today" in (
        report.errors()[0].message
    )
