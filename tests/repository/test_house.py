"""The rules of the house hold everywhere, and each of them notices what it is for."""

import ast
from pathlib import Path

import house
import pytest

CODE = (*house.PACKAGES, "kernels/benchmarks", "trainer_image/benchmarks")


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_no_file_breaks_a_rule(rule: object) -> None:
    found = [
        f"{source.path.relative_to(house.CHECKOUT)}:{line}"
        for source in house.read_sources(*CODE)
        for line in rule(source)
    ]
    assert not found, "\n".join(found)


def test_no_folder_holds_more_modules_than_a_person_can_survey() -> None:
    assert house.crowded_folders(*CODE, "tests") == []


def test_bodies_breathe_and_carry_reasons() -> None:
    measures = house.measure(*house.PACKAGES)
    assert measures.blank_lines >= 0.07, "blank lines inside functions: the anchors have 7 to 12 %"
    assert measures.comments >= 0.03


BROKEN = '''
def crowded(a, b, c, d, e, f, g):
    """Whether it is crowded."""
''' + "\n".join(f"    x{number} = {number}" for number in range(14))


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_a_rule_notices_what_breaks_it(rule: object, tmp_path: Path) -> None:
    source = house.Source(tmp_path / "broken.py", BROKEN, ast.parse(BROKEN))
    assert len(list(rule(source))) == 1


def test_a_crowded_folder_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house, "CHECKOUT", tmp_path)
    for number in range(house.MAX_MODULES + 1):
        (tmp_path / f"module_{number}.py").touch()
    assert house.crowded_folders(".") == [f".: {house.MAX_MODULES + 1} modules"]
