"""Logging of the trainer: one line per event on stderr, libraries quiet unless something is wrong."""

import logging
import os
import warnings

NOISY = ("httpx", "botocore", "urllib3", "bitsandbytes", "datasets", "filelock", "accelerate", "gguf", "awscrt")


def configure_logging(level: int = logging.INFO) -> None:
    """Sets up the root logger."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # these are for whoever upgrades libraries, not for readers of a pod's log
    for name in NOISY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def configure_screen_logging(*, verbose: bool) -> None:
    """Sets up the logging of a command at a terminal: nothing of libraries, unless `verbose`.

    Call it before transformers and huggingface_hub are imported, which read these variables then: progress bars of
    their own would tear the live view, and their advice is for those who write such a command.
    """
    configure_logging(logging.INFO if verbose else logging.ERROR)
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    if not verbose:
        os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
        warnings.simplefilter("ignore")
