"""The documentation's site: its generated page is fresh, its manifests are valid, its links lead to what they name."""

import re
from pathlib import Path

import docs_site
import family_table
import field_table
import pytest
import sizing_table

from finetune_api.definition import custom_resource_definition
from finetune_api.failures import FailureReason
from finetune_api.job import load_manifest
from finetune_api.vocabulary import Parallelism
from finetune_operator.status_reasons import StatusReason
from finetune_test_models.minimal_run import minimal_run
from finetune_trainer.preflight.memory.plans import Plans

PAGES = [docs_site.DOCS / name for name in ("index.md", "quickstart.md")]


def test_the_generated_pages_are_fresh() -> None:
    stale = "run `make generate`"
    assert (docs_site.DOCS / "fields.md").read_text() == field_table.page(), stale
    assert (docs_site.DOCS / "sizing.md").read_text() == sizing_table.page(), stale
    assert (docs_site.DOCS / "families.md").read_text() == family_table.page(), stale


def test_the_sizes_are_those_that_were_measured() -> None:
    """Llama 3.1 8B, two sequences of 2,048 tokens, on one H200: docs/benchmarks.md. The smallest plan was measured with
    all weights on the GPU; of those two layers of 32 stay there if they stream."""
    model = sizing_table.MODELS["Llama 3.1 8B"]
    found = sizing_table.estimate(model, 2 * 2048)
    plans = Plans.of(minimal_run(), model, Parallelism.REPLICATED)
    assert plans is not None

    resident = plans.without_streaming().smallest(2 * 2048)
    measured = (30.89, 4.59)
    sizes = tuple(size / sizing_table.GIBIBYTE for size in (found.peak_bytes, resident.peak_bytes))
    assert sizes == pytest.approx(measured, rel=0.02)
    assert resident.peak_bytes - found.smallest_bytes == 30 * plans.shape.streamable_bytes[0]


def test_the_page_of_fields_has_every_field() -> None:
    page = (docs_site.DOCS / "fields.md").read_text()
    schema = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert all(f"| `{name}`" in page for name in schema["properties"]["runPolicy"]["properties"])
    assert "| `stallTimeoutSeconds` | integer from 10 |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_manifests_of_the_first_pages_are_valid(page: Path) -> None:
    manifests = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    assert manifests
    for manifest in manifests:
        load_manifest(manifest)


def test_what_lies_outside_the_documents_comes_into_the_site(tmp_path: Path) -> None:
    docs_site.write_source(tmp_path / "site")
    pages = tmp_path / "site/pages"
    assert "](crds/samples/full.yaml)" in (pages / "fields.md").read_text()
    assert (pages / "crds/samples/full.yaml").is_file()
    assert not (pages / "site").exists()


def test_every_page_has_a_place_in_the_navigation() -> None:
    """mkdocs says so as well, in `make docs`."""
    navigation = (docs_site.DOCS / "site/mkdocs.yml").read_text()
    pages = [str(page.relative_to(docs_site.DOCS)) for page in docs_site.DOCS.rglob("*.md")]
    assert [page for page in pages if not re.search(rf"[ :]{re.escape(page)}$", navigation, re.MULTILINE)] == []


def test_troubleshooting_names_reasons_and_fields_that_exist() -> None:
    page = (docs_site.DOCS / "troubleshooting.md").read_text()
    words = set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)+)`", page))
    assert len(words) > 20
    assert words <= {*FailureReason, *StatusReason}
    fields = (docs_site.DOCS / "fields.md").read_text()
    for section, name in re.findall(r"`(spec|status)\.(?:\w+\.)*(\w+)`", page):
        assert f"| `{name}`" in fields, f"{section}: {name}"
