"""`finetune-trainer` that sends itself SIGTERM in the middle of a named function, as a program of its own.

    python -m finetune_test_programs.signalled_trainer VERB [MODULE:NAME CALL STALL]

The signal arrives at the CALL-th call (from 1). The function then takes STALL seconds more and swallows whatever is
raised meanwhile, as libraries do. A name may have dots: Class.method. Without a name, the signal arrives while the
module is imported.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any


def stall(seconds: float) -> None:
    """Sleeps; exceptions that a signal's handler raises are swallowed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            time.sleep(0.05)
        except Exception:  # noqa: BLE001 (as libraries do)
            continue


def signal_now(seconds: float) -> None:
    """Sends the signal, then takes so many seconds."""
    print(f"signal at {time.time()}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    stall(seconds)


def plant(module: Any, name: str, call: int, act: Callable[[], None]) -> None:
    """Replaces a function of a module by one that calls `act` first, the `call`-th time."""
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, module)
    original, calls = getattr(owner, last), [0]

    def signalled(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            act()
        return original(*arguments, **options)

    setattr(owner, last, signalled)


class PlantAtImport(importlib.abc.MetaPathFinder):
    """Plants once the module has been imported by the trainer itself: importing it here would change what is tested."""

    def __init__(self, module: str, name: str, call: int, act: Callable[[], None]) -> None:
        self._module, self._rest = module, (name, call, act)

    def find_spec(self, fullname: str, *_: Any) -> Any:
        """Wraps the loader of the one module."""
        if fullname != self._module:
            return None

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        sys.meta_path.insert(0, self)  # some only ask whether the module is there
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            name, call, act = self._rest
            if not name:
                act()
            load(module)
            if name:
                plant(module, name, call, act)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def main() -> None:
    """Runs `finetune-trainer`."""
    verb, *planted = sys.argv[1:]
    if planted:
        function, call, seconds = planted
        run_trainer(verb, function, call, partial(signal_now, float(seconds)))
    else:
        run_trainer(verb)


def run_trainer(verb: str, function: str = "", call: str = "0", act: Callable[[], None] = lambda: None) -> None:
    """Runs `finetune-trainer`; `act` is called in the middle of a function, if one is named."""
    sys.argv[1:] = [verb]
    if function:
        module, _, name = function.partition(":")
        sys.meta_path.insert(0, PlantAtImport(module, name, int(call), act))

    from finetune_trainer.cli.pod import main as run

    run()


if __name__ == "__main__":
    main()
