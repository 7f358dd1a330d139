"""Logging of the trainer: one line per event on stderr, libraries quiet unless something is wrong."""

import logging
import warnings

NOISY = ("httpx", "botocore", "urllib3", "bitsandbytes", "datasets", "filelock", "accelerate", "gguf", "awscrt")


def configure_logging(level: int = logging.INFO) -> None:
    """Sets up the root logger."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # these are for whoever upgrades libraries, not for readers of a pod's log
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
