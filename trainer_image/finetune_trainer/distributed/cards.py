"""Chooses the GPU of a process, before any library has begun to use CUDA. Knows no PyTorch.

CUDA reads CUDA_VISIBLE_DEVICES once. bitsandbytes starts CUDA when it is imported, and TRL refuses a process that sees
several GPUs. So a run hides all but one first, and tells the other ranks which there are.
"""

import os
from pathlib import Path

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError

VISIBLE = "CUDA_VISIBLE_DEVICES"
ALL = "FINETUNE_VISIBLE_DEVICES"
"""The GPUs of the run, once one of them is chosen."""


def all_cards(devices: Path = Path("/dev")) -> list[str]:
    """Returns the names of the run's GPUs, as CUDA_VISIBLE_DEVICES would have them."""
    for variable in (ALL, VISIBLE):
        if variable in os.environ:
            return [card for card in os.environ[variable].split(",") if card]
    return [str(number) for number, _ in enumerate(devices.glob("nvidia[0-9]*"))]


def see_one_card(place: int) -> None:
    """Leaves this process one of the run's GPUs, as cuda:0. Does nothing if there is no choice."""
    cards = all_cards()
    if len(cards) > 1:
        os.environ |= {ALL: ",".join(cards), VISIBLE: cards[place]}


def check_cards(gpus: int) -> None:
    """Raises TrainerError (InvalidConfiguration) if several GPUs are asked for and fewer are there."""
    found = len(all_cards())
    if found < gpus and gpus > 1:
        what = f"{found} CUDA device{' is' if found == 1 else 's are'} visible"
        message = f"spec.resources.gpus is {gpus}, but {what}: check the driver, or write gpus: {found}"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
