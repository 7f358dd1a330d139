"""The config with every default filled in and RoPE settings in one form, by transformers' config classes.

Published files leave out what equals a default of their time; only those classes know the defaults. Needs no PyTorch.
"""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from finetune_api.base import Json
from finetune_trainer.export.errors import UnsupportedArchitectureError
from finetune_trainer.model.configuration.reading import read_published_config


def read_full_config(folder: Path) -> Json:
    """Read config.json below `folder`; raises UnsupportedArchitectureError if transformers cannot."""
    try:
        config: Json = read_published_config(folder).to_dict()
    except (ValueError, OSError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UnsupportedArchitectureError(f"cannot read {folder / 'config.json'}: {error}") from error
    return config
