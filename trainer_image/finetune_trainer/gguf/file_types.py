"""Which type each tensor has in a GGUF file of a given type: llama.cpp's rules for what is too small or too dear to
quantise."""

from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from finetune_trainer.export.errors import UnsupportedTypeError


@dataclass(frozen=True)
class FileType:
    """A type as users name it: the number in `general.file_type`, the type of matrices, and that of the output matrix.

    The output matrix (the embedding, where the two are tied) decides every logit, so 4- and 5-bit files keep it finer.
    """

    number: LlamaFileType
    matrices: GGMLQuantizationType
    output: GGMLQuantizationType


_TYPE = GGMLQuantizationType
FILE_TYPES: dict[str, FileType] = {
    "F32": FileType(LlamaFileType.ALL_F32, _TYPE.F32, _TYPE.F32),
    "F16": FileType(LlamaFileType.MOSTLY_F16, _TYPE.F16, _TYPE.F16),
    "BF16": FileType(LlamaFileType.MOSTLY_BF16, _TYPE.BF16, _TYPE.BF16),
    "Q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, _TYPE.Q8_0, _TYPE.Q8_0),
    "Q5_1": FileType(LlamaFileType.MOSTLY_Q5_1, _TYPE.Q5_1, _TYPE.Q8_0),
    "Q5_0": FileType(LlamaFileType.MOSTLY_Q5_0, _TYPE.Q5_0, _TYPE.Q8_0),
    "Q4_1": FileType(LlamaFileType.MOSTLY_Q4_1, _TYPE.Q4_1, _TYPE.Q8_0),
    "Q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, _TYPE.Q4_0, _TYPE.Q8_0),
}


def find_file_type(name: str) -> FileType:
    """The file type that users call `name`; raises UnsupportedTypeError naming the known ones."""
    if name not in FILE_TYPES:
        raise UnsupportedTypeError(f"GGUF type {name!r} is not written; choose among {', '.join(FILE_TYPES)}")
    return FILE_TYPES[name]


def choose_tensor_type(
    file_type: FileType, name: str, shape: tuple[int, ...], *, output_name: str
) -> GGMLQuantizationType:
    """The type of tensor `name` (its GGUF name): vectors and norms stay F32; rows that do not split into blocks are
    F16."""
    if len(shape) == 1 or name.endswith("_norm.weight"):
        return GGMLQuantizationType.F32
    chosen = file_type.output if name == output_name else file_type.matrices
    block_size, _ = GGML_QUANT_SIZES[chosen]
    return chosen if shape[-1] % block_size == 0 else GGMLQuantizationType.F16
