"""F32, F16 and BF16: the types that store each weight alone, without blocks or scales."""

from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType

from finetune_trainer.export.quantization.quantizer import Quantizer, as_bytes


@dataclass(frozen=True)
class FloatQuantizer(Quantizer):
    """A floating-point type, rounded to nearest with ties to even."""

    dtype: torch.dtype

    def encode(self, blocks: torch.Tensor) -> torch.Tensor:
        return as_bytes(blocks, self.dtype)


QUANTIZERS = {
    GGMLQuantizationType.F32: FloatQuantizer(torch.float32),
    GGMLQuantizationType.F16: FloatQuantizer(torch.float16),
    GGMLQuantizationType.BF16: FloatQuantizer(torch.bfloat16),
}
FLOAT_DTYPES = {tensor_type: quantizer.dtype for tensor_type, quantizer in QUANTIZERS.items()}
