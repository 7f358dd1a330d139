"""Every operation exports the same five names, with signatures that fit together."""

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch

from finetune_kernels import ops

NAMES = [module.name for module in pkgutil.iter_modules(ops.__path__)]


def function_name(name: str) -> str:
    """The autograd Function of a module: rms_norm -> RmsNormFunction."""
    return "".join(word.capitalize() for word in name.split("_")) + "Function"


def missing(module: ModuleType, name: str) -> list[str]:
    """Names of the five that a module lacks."""
    found = vars(module)
    wanted = [part for part in ("reference", "forward", "backward", name) if not inspect.isfunction(found.get(part))]
    function = found.get(function_name(name))
    if not (inspect.isclass(function) and issubclass(function, torch.autograd.Function)):
        wanted.append(function_name(name))
    return wanted


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_exports_the_five(name: str) -> None:
    module = importlib.import_module(f"finetune_kernels.ops.{name}")
    assert missing(module, name) == []
    own = [getattr(module, part) for part in ("reference", "forward", "backward", name, function_name(name))]
    assert {part.__module__ for part in own} == {module.__name__}, "they are the module's own"


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_takes_what_the_operation_takes(name: str) -> None:
    module = importlib.import_module(f"finetune_kernels.ops.{name}")
    public, reference = (list(inspect.signature(getattr(module, part)).parameters) for part in (name, "reference"))
    if name == "lora_linear":  # its weight is a call that dequantises
        public[1] = "w"
    assert reference == public


def test_the_folder_lists_its_operations() -> None:
    assert len(NAMES) >= 9
    listed = {line.split()[0] for line in (ops.__doc__ or "").splitlines() if "  " in line}
    assert listed == set(NAMES)


def test_a_module_that_lacks_one_is_noticed() -> None:
    module = ModuleType("rms_norm")
    complete = importlib.import_module("finetune_kernels.ops.rms_norm")
    parts = ("reference", "forward", "backward", "rms_norm", "RmsNormFunction")
    for absent in parts:
        vars(module).update({part: getattr(complete, part) for part in parts})
        del vars(module)[absent]
        assert missing(module, "rms_norm") == [absent]
    vars(module).update({"RmsNormFunction": int, "rms_norm": complete.rms_norm})
    assert missing(module, "rms_norm") == ["RmsNormFunction"]
