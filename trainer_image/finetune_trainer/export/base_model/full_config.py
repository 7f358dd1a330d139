"""The config with every default filled in and RoPE settings in one form, by transformers' config classes.

Published files leave out what equals a default of their time; only those classes know the defaults. Needs no PyTorch.
"""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from finetune_api.base import Json
from finetune_trainer.export.errors import UnsupportedArchitectureError
from finetune_trainer.model.configuration.reading import read_published_config

LAYERS = "num_hidden_layers"


def read_full_config(folder: Path) -> Json:
    """Read config.json below `folder`; raises UnsupportedArchitectureError if transformers cannot."""
    try:
        found = read_published_config(folder)
        config: Json = found.to_dict()
        if isinstance(getattr(type(found), LAYERS, None), property):  # Nemotron H counts its kinds of layers
            config[LAYERS] = found.num_hidden_layers
    except (ValueError, OSError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UnsupportedArchitectureError(f"cannot read {folder / 'config.json'}: {error}") from error
    return config
