"""Finds where the threads of this process are, without reading a file: for the last word of a run that is stuck."""

import sys
import threading
from types import FrameType

from finetune_trainer.stopping import ABANDONABLE

_WAITING = ("stopping.py", "queue.py", "threading.py")


def innermost_frame() -> str:
    """Returns where the main thread waits, as "ssl.py:1100 in read"; where it waits for work that it could leave alone,
    where that work is."""
    frames = sys._current_frames()
    main = threading.main_thread().ident
    frame = frames.get(main) if main is not None else None

    if frame is not None and _file(frame) in _WAITING:
        working = [each for each in threading.enumerate() if each.name == ABANDONABLE and each.ident in frames]
        frame = frames[working[-1].ident or 0] if working else frame
    return f"{_file(frame)}:{frame.f_lineno} in {frame.f_code.co_name}" if frame is not None else "an unknown place"


def name_threads() -> str:
    """Returns the names of the threads by the numbers that faulthandler shows."""
    return ", ".join(f"0x{thread.ident or 0:016x} is {thread.name}" for thread in threading.enumerate())


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename.rpartition("/")[2]
