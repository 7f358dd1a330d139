"""Logging of the trainer: one line per event on stderr, libraries quiet unless something is wrong."""

import logging
import os
import socket
import warnings
from collections.abc import Callable, Mapping

from finetune_api.logs.formats import LogFormat, build_formatter
from finetune_api.run_config import RunConfig

NOISY = ("httpx", "botocore", "urllib3", "bitsandbytes", "datasets", "filelock", "accelerate", "gguf", "awscrt")
OURS = ("finetune_trainer", "finetune_kernels")


def configure_logging(
    level: int = logging.INFO, form: LogFormat = LogFormat.TEXT, fields: Mapping[str, str] | None = None
) -> None:
    """Sets up the root logger. `fields`: what every line says in JSON, such as the job's name."""
    handler = logging.StreamHandler()
    handler.setFormatter(build_formatter(form, fields))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # these are for whoever upgrades libraries, not for readers of a pod's log
    # fla, when transformers imports it where there is no GPU; linear attention runs in transformers' loops there.
    warnings.filterwarnings("ignore", "Triton is not supported on current platform", UserWarning)
    for name in NOISY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def configure_pod_logging(config: RunConfig, attempt_id: str) -> None:
    """Sets up the log of a pod as its installation wants it, with the job's names in every line of JSON."""
    job = config.job
    fields = {"namespace": job.namespace, "job": job.name, "job_uid": job.uid, "attempt": attempt_id}
    configure_logging(form=config.log_format, fields=fields | {"pod": socket.gethostname()})


def configure_screen_logging(say: Callable[[str], None], *, verbose: bool) -> None:
    """Sets up the logging of a command at a terminal: our own warnings by `say`, and nothing of libraries.

    With `verbose`, everything is logged as in a pod. Call it before torch, transformers and huggingface_hub are
    imported, which read these variables then: progress bars of their own would tear the live view.
    """
    configure_logging(logging.INFO if verbose else logging.ERROR)
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    if verbose:
        return

    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
    os.environ.setdefault("TORCH_LOGS", "-all")  # torch's loggers have handlers of their own; "-": errors only
    warnings.simplefilter("ignore")
    for name in OURS:
        ours = logging.getLogger(name)
        ours.handlers, ours.propagate = [ScreenHandler(say)], False
        ours.setLevel(logging.WARNING)


class ScreenHandler(logging.Handler):
    """Says warnings in words, and defects with their traceback; a failure with a reason is told by the outcome."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Says one record."""
        if record.levelno < logging.ERROR:
            self._say(f"note: {record.getMessage()}")
        elif record.exc_info:
            self._say(self.format(record))
