"""The repository's own promises: no shadowing, small files, fresh generated files, nothing private committed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from house import CHECKOUT, PACKAGES, length, read_sources

from finetune_api.generate import generated_files, main

MAX_FILE_LINES = {"tests": 320} | dict.fromkeys(PACKAGES, 300)
MAX_FUNCTION_LINES = {"tests": 60} | dict.fromkeys(PACKAGES, 50)
TOP_LEVEL = ("crds", "operator", "trainer_image", "kernels", "charts", "tests")
# Names of registries and of machines' own paths; each pattern is written so that it does not match itself.
PRIVATE = re.compile(r"pypi\.(?:org)|files\.python(?:hosted)|registry\.npm(?:js)|/(?:root|work)/[a-z.]|index-[u]rl")


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    return [CHECKOUT / name for name in listed.split("\0") if name]


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((CHECKOUT / folder).rglob("*.py"))]


def test_no_package_file_directly_in_a_top_level_folder() -> None:
    assert not [path for folder in TOP_LEVEL for path in (CHECKOUT / folder).glob("__init__.py")]
    assert not list((CHECKOUT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("module", ["operator", "collections"])
def test_the_operator_folder_does_not_shadow_the_standard_library(module: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); import {module}; print({module}.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert not done.stdout.startswith(str(CHECKOUT))


def test_an_init_file_in_the_operator_folder_would_break_python(tmp_path: Path) -> None:
    (tmp_path / "operator").mkdir()
    (tmp_path / "operator/__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import collections"
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode != 0, "the trap that the test above guards against is gone: it can be removed"


def test_python_never_runs_with_the_checkout_on_its_path() -> None:
    assert str(CHECKOUT) not in sys.path
    assert sys.flags.safe_path, "run tests with PYTHONSAFEPATH=1, as `make test` does"


@pytest.mark.parametrize("folder", MAX_FILE_LINES)
def test_files_and_functions_stay_small(folder: str) -> None:
    long_files, long_functions = [], []
    for source in read_sources(folder):
        name, lines = source.path.relative_to(CHECKOUT), source.text.count("\n")
        if lines > MAX_FILE_LINES[folder]:
            long_files.append(f"{name}: {lines} lines")

        too_long = [function for function in source.functions if length(function) > MAX_FUNCTION_LINES[folder]]
        long_functions += [f"{name}: {function.name} has {length(function)} lines" for function in too_long]

    assert not long_files
    assert not long_functions


def test_generated_files_are_fresh_and_a_stale_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--check"]) == 0
    changed = {path: text + "# edited\n" for path, text in generated_files().items()}
    monkeypatch.setattr("finetune_api.generate.generated_files", lambda: changed)
    assert main(["--check"]) == 1


def test_nothing_committed_names_a_registry_or_a_machine() -> None:
    found = []
    for path in tracked():
        if path.suffix in (".sum", ".png") or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if PRIVATE.search(line):
                found.append(f"{path.relative_to(CHECKOUT)}:{number}: {line.strip()[:100]}")
    assert not found


def test_every_public_function_and_class_has_a_docstring() -> None:
    silent = []
    for path in python_files(*PACKAGES):
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree) and tree.body:
            silent.append(f"{path.relative_to(CHECKOUT)}: module")
        for node in tree.body:
            is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_definition and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{path.relative_to(CHECKOUT)}: {node.name}")
    assert not silent
