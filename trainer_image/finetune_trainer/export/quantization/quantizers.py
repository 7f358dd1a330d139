"""The table of all tensor types that are written. To add a type, add its row to the QUANTIZERS of its family's file."""

from gguf import GGMLQuantizationType

from finetune_trainer.export.quantization import affine, codebook, floats, plain, symmetric
from finetune_trainer.export.quantization.quantizer import Quantizer

QUANTIZERS: dict[GGMLQuantizationType, Quantizer] = {
    **floats.QUANTIZERS,
    **plain.QUANTIZERS,
    **affine.QUANTIZERS,
    **symmetric.QUANTIZERS,
    **codebook.QUANTIZERS,
}
"""`quantize` encodes with these in torch; `cpu.encode` derives its table of compiled encoders from them."""
