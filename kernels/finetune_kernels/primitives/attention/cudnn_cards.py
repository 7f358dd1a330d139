"""Cards on which cuDNN's attention is used."""

import torch

OLDEST = 91_501
"""The first cuDNN that is used, 9.15.1."""
CAPABILITIES = ((9, 0), (10, 0), (10, 3))
"""Cards on which cuDNN's kernel is faster than FlashAttention; on an A100, an A10G or an RTX PRO 6000 it is slower."""


def is_faster(device: torch.device) -> bool:
    """True if cuDNN is new enough, and `device` a card on which it is faster than FlashAttention."""
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    if device.type != "cuda" or (version or 0) < OLDEST:
        return False
    return torch.cuda.get_device_capability(device) in CAPABILITIES
