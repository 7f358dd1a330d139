"""`finetune-trainer run` that hangs in the middle of a named function, as a program of its own.

    python -m finetune_test_programs.hanging_trainer MODULE:NAME CALL HOW

HOW: `asleep` waits for ever as a dead connection does; `native` waits in C code that holds the interpreter's lock, so
that no other thread runs; `stopped` sends the process SIGSTOP.
"""

import ctypes
import os
import signal
import sys
import time

from finetune_test_programs.signalled_trainer import run_trainer


def hang(how: str) -> None:
    """Hangs for ten minutes, or until somebody sends SIGCONT."""
    print(f"hanging at {time.time()}", file=sys.stderr, flush=True)
    if how == "native":
        ctypes.PyDLL(None).sleep(600)
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(600)


if __name__ == "__main__":
    function, call, how = sys.argv[1:]
    run_trainer("run", function, call, lambda: hang(how))
