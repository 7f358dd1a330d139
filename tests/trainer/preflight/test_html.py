"""The page: every value that is inserted stays text, and long lists are folded."""

from html.parser import HTMLParser

import pytest

from finetune_api.failures import FailureReason
from finetune_api.vocabulary import MemoryMode
from finetune_trainer.preflight.html import render_html
from finetune_trainer.preflight.report import Finding, GpuEstimate, LabelledText, PlanRow, Report, Sample
from finetune_trainer.preflight.statistics import describe_tokens

HOSTILE = "<b title='{0}'>\"{0}\" & &amp; {{{{ {0} }}}}</pre></table>"
FIELDS = (
    *("job", "model", "revision", "architecture", "dataset", "detection"),
    *("GPU", "plan name", "plan value"),
    *("error at", "error", "folded error at", "folded error", "warning at", "warning"),
    *("sample at", "prompt", "answer"),
)


class Page(HTMLParser):
    """Tags and texts as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", []))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def report(pattern: str) -> Report:
    """A report with every part, in which each text is the pattern with the field's name."""
    text = {name: pattern.format(name) for name in FIELDS}
    plain_error = Finding.error("rows.jsonl:1", "a role", FailureReason.INVALID_ROW)
    return Report(
        job=text["job"],
        model_source=text["model"],
        model_revision=text["revision"],
        architecture=text["architecture"],
        dataset_source=text["dataset"],
        dataset_detection=text["detection"],
        max_sequence_length=64,
        tokens=describe_tokens([10, 20, 100], [5, 10, 0], 64),
        gpu=GpuEstimate(
            name=text["GPU"],
            memory_bytes=80 << 30,
            mode=MemoryMode.SMALLEST,
            peak_bytes=31 << 30,
            smallest_bytes=31 << 30,
            plan=(PlanRow(name=text["plan name"], value=text["plan value"]),),
        ),
        findings=(
            Finding.error(text["error at"], text["error"], FailureReason.INVALID_ROW),
            *[plain_error] * 20,
            Finding.error(text["folded error at"], text["folded error"], FailureReason.INVALID_ROW),
            Finding.warning(text["warning at"], text["warning"]),
        ),
        more_errors=3,
        samples=(
            Sample(
                location=text["sample at"],
                spans=(
                    LabelledText(text=text["prompt"], supervised=False),
                    LabelledText(text=text["answer"], supervised=True),
                ),
            ),
        ),
    )


@pytest.mark.parametrize("name", FIELDS)
def test_every_inserted_value_stays_text(name: str) -> None:
    page = Page(render_html(report(HOSTILE)))
    assert any(HOSTILE.format(name) in text for text in page.texts), "the browser shows what was inserted"


def test_inserted_values_add_no_tag_and_no_attribute() -> None:
    assert Page(render_html(report(HOSTILE))).tags == Page(render_html(report("harmless {0}"))).tags
    assert ("b", [("title", "job")]) in Page(HOSTILE.format("job")).tags, "the control"


def test_findings_beyond_the_limit_are_folded_and_bad_rows_beyond_the_report_counted() -> None:
    page = render_html(report("{0}"))
    assert page.index("<code>error at</code>") < page.index("<details><summary>2 more</summary>")
    assert page.index("<details>") < page.index("<code>folded error at</code>") < page.index("</details>")
    assert "And 3 bad rows that are only counted." in page
    assert "<b>The job cannot run as it is</b>: 25 errors, 1 warning." in page


def test_a_report_without_findings_says_that_the_job_can_run() -> None:
    page = render_html(report("{0}").model_copy(update={"findings": (), "more_errors": 0, "samples": ()}))
    assert "<b>The job can run</b>: 0 errors, 0 warnings." in page
    assert "Errors" not in page
    assert "Rows as the model reads them" not in page
