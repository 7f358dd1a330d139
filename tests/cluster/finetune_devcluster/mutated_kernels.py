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


def true_modules(name: str) -> ModuleType:
    """The package as it is."""
    return importlib.import_module(f"{PACKAGE}.{name}")


def write_mutant(module: str, was: str, now: str, folder: Path) -> Path:
    """A copy, in `folder`, of the only module matching `module` that says `was`: once, and `now` instead."""
    package = Path(str(true_modules("rms_norm").__file__)).parent
    sources = {path.stem: path.read_text() for path in package.glob(f"{module}.py")}
    places = {name: text.count(was) for name, text in sources.items() if was in text}
    assert sum(places.values()) == 1, f"{was!r} stands once in {module}, not {places}: adapt mutants.yaml"
    (name,) = places
    path = folder / f"{name}.py"
    path.write_text(sources[name].replace(was, now))
    return path


def loaded_afresh(path: Path, wanted: Sequence[str]) -> Load:
    """The package's modules `wanted`, with the module of the same name taken from `path`; the process keeps its own."""
    own = {name: value for name, value in sys.modules.items() if name.split(".")[0] == PACKAGE}
    for name in own:
        del sys.modules[name]
    try:
        package = importlib.import_module(PACKAGE)  # empty: its modules follow
        spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        mutant = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        setattr(package, path.stem, mutant)
        spec.loader.exec_module(mutant)
        return {name: importlib.import_module(f"{PACKAGE}.{name}") for name in wanted}.__getitem__
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.modules.update(own)
