"""Every room says what is in it, and the documents name only what exists."""

import ast
import re
from pathlib import Path

import pytest
from house import CHECKOUT, PACKAGES

DOCUMENTS = sorted(path for path in (CHECKOUT / "docs").rglob("*.md"))
MAIN_DOCUMENTS = [CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md")]


def rooms() -> list[Path]:
    """Folders of the packages that hold modules."""
    found = {path.parent for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py")}
    return sorted(found)


def unlisted(room: Path) -> list[str]:
    """Modules and folders of a room that its `__init__.py` does not name."""
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    modules = [path.stem for path in room.glob("*.py") if path.stem != "__init__"]
    folders = [path.parent.name for path in room.glob("*/__init__.py")]
    return [name for name in sorted(modules + folders) if not re.search(rf"\b{re.escape(name)}\b", text)]


@pytest.mark.parametrize("room", rooms(), ids=lambda room: str(room.relative_to(CHECKOUT)))
def test_a_room_lists_its_files(room: Path) -> None:
    assert unlisted(room) == []


def test_a_file_that_is_not_listed_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text('"""A room.\n\n    known    a file\n"""\n')
    for name in ("known", "forgotten"):
        (tmp_path / f"{name}.py").touch()
    assert unlisted(tmp_path) == ["forgotten"]


def test_readme_tree_names_files_that_exist() -> None:
    tree = re.search(r"## The tree.*?```\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL)
    assert tree is not None
    folders: list[str] = []
    missing = []
    for line in tree[1].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name.rstrip("/")]
        # A line names a folder or a file, then says what it holds: names with a dot or a slash there are files as well.
        if not (CHECKOUT / "/".join(folders)).exists():
            missing.append("/".join(folders))
        parent = CHECKOUT / "/".join(folders if name.endswith("/") else folders[:-1])
        missing += [
            f"{'/'.join(folders)}: {word}"
            for word in re.findall(r"\b[\w/]+\.py\b", line)
            if not (parent / word).exists()
        ]
    assert missing == []


@pytest.mark.parametrize("document", [*MAIN_DOCUMENTS, *DOCUMENTS], ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", MAIN_DOCUMENTS, ids=lambda path: path.name)
def test_paths_in_documents_exist(document: Path) -> None:
    paths = re.findall(r"`((?:crds|operator|trainer_image|kernels|charts|tests|docs)/[\w./-]+)`", document.read_text())
    assert [path for path in paths if not (CHECKOUT / path).exists()] == []
