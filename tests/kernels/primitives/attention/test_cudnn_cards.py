"""Cards and versions with which cuDNN's attention is used."""

import pytest
import torch

from finetune_kernels.primitives.attention import cudnn_cards


@pytest.mark.parametrize(
    ("device", "version", "capability", "expected"),
    [
        ("cuda", 91_501, (9, 0), True),
        ("cuda", 91_500, (9, 0), False),
        ("cuda", None, (9, 0), False),
        ("cuda", 92_000, (10, 0), True),
        ("cuda", 92_000, (8, 0), False),
        ("cuda", 92_000, (8, 6), False),
        ("cuda", 92_000, (12, 0), False),
        ("meta", 92_000, (9, 0), False),
    ],
)
def test_cards_and_versions_of_cudnn(
    device: str, version: int | None, capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cudnn_cards.is_faster(torch.device(device)) is expected
