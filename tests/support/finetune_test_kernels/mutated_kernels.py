"""The kernels' package with one line changed, beside the true one."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

PACKAGE = "finetune_kernels"
Load = Callable[[str], ModuleType]
"""Gives a module of the package by its name."""


def _qualified_name(stem: str) -> str:
    """The full name of the only module called `stem`, in whichever folder of the package it is."""
    root = Path(str(importlib.import_module(PACKAGE).__file__)).parent
    (path,) = root.rglob(f"{stem}.py")
    return ".".join((PACKAGE, *path.relative_to(root).with_suffix("").parts))


def true_modules(stem: str) -> ModuleType:
    """The package as it is."""
    return importlib.import_module(_qualified_name(stem))


def write_mutant(module: str, was: str, now: str, folder: Path) -> Path:
    """A copy, in `folder`, of the only module matching `module` that says `was`: once, and `now` instead."""
    package = Path(str(importlib.import_module(PACKAGE).__file__)).parent
    sources = {path.stem: path.read_text() for path in package.rglob(f"{module}.py") if path.stem != "__init__"}
    places = {name: text.count(was) for name, text in sources.items() if was in text}
    assert sum(places.values()) == 1, f"{was!r} stands once in {module}, not {places}: adapt mutants.yaml"
    (name,) = places
    path = folder / f"{name}.py"
    path.write_text(sources[name].replace(was, now))
    return path


def loaded_afresh(path: Path, wanted: Sequence[str]) -> Load:
    """The package's modules `wanted`, with the module of the same name taken from `path`; the process keeps its own."""
    names = {stem: _qualified_name(stem) for stem in (*wanted, path.stem)}
    own = {name: value for name, value in sys.modules.items() if name.split(".")[0] == PACKAGE}
    for name in own:
        del sys.modules[name]

    try:
        full_name = names[path.stem]
        parent = importlib.import_module(full_name.rpartition(".")[0])  # packages are empty: their modules follow
        spec = importlib.util.spec_from_file_location(full_name, path)
        assert spec is not None
        assert spec.loader is not None

        mutant = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        setattr(parent, path.stem, mutant)
        spec.loader.exec_module(mutant)
        return {stem: importlib.import_module(names[stem]) for stem in wanted}.__getitem__
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.modules.update(own)
