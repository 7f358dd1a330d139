"""The loss of a packed row through whole layers and the fused head is the sum of its documents' own losses, and so are
the gradients (in the interpreter; test_gpu_layers.py has the same in bfloat16)."""

from typing import Any

import pytest
import torch

from finetune_kernels.layers import supervised_loss as fused_loss
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.ops.linear_cross_entropy import LinearCrossEntropyFunction
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_test_kernels.small_layers import small_model
from finetune_test_kernels.tensor_checks import relative_error
from finetune_trainer.training.collator import collate_packed

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
LENGTHS = (1, 7, 2, 6)


def results(model: Any, tokens: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and the adapters' gradients of one row of documents; their first tokens are not predicted."""
    rows = [{"input_ids": part, "labels": part} for part in tokens.split(lengths)]
    batch = collate_packed(rows)
    labels, supervised = batch.pop("labels"), batch.pop("supervised")
    loss = fused_loss.fused_supervised_loss(model, batch, labels, supervised, 1)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss.detach(), torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma2"])
def test_packed_is_the_sum_of_unpacked(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_loss, "linear_cross_entropy", LinearCrossEntropyFunction.apply)
    model = small_model(family, torch.float32, layers=2)
    FusedLayers(
        model.get_base_model(),
        [ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_ALL],
        torch.float32,
        keep_dequantized=True,
    )
    tokens = torch.arange(sum(LENGTHS)) * 5 % 23
    loss, gradient = results(model, tokens, LENGTHS)
    apart = [results(model, part, (part.numel(),)) for part in tokens.split(LENGTHS)]

    assert apart[0][0] == 0  # a document of one token has nothing to predict
    assert relative_error(loss, torch.stack([one for one, _ in apart]).sum()) < 2e-6  # fp32; 9e-8 was measured
    assert relative_error(gradient, torch.stack([one for _, one in apart]).sum(0)) < 5e-6  # 2e-7
    joined, _ = results(model, tokens, (sum(LENGTHS),))
    assert relative_error(joined, loss) > 1e-2
