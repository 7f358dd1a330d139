"""The GGUF file types that users name, such as Q4_K_M, by their names in `finetune_api.vocabulary.GgufType`."""

from dataclasses import dataclass

from gguf import GGMLQuantizationType, LlamaFileType

from finetune_api.vocabulary import GgufType
from finetune_trainer.export.errors import UnsupportedTypeError


@dataclass(frozen=True)
class FileType:
    """A type as users name it; `tensor_types` says which tensors have another type than `matrices`."""

    name: GgufType
    number: LlamaFileType
    """Value of `general.file_type`."""
    matrices: GGMLQuantizationType
    """The type that most matrices have."""


def _file_type(name: GgufType) -> FileType:
    """Derive the row from the name: Q4_K_M is a mix around Q4_K, MXFP4_MOE has experts in MXFP4; a type without suffix
    has the name of its matrices."""
    number = LlamaFileType["ALL_F32" if name is GgufType.F32 else f"MOSTLY_{name}"]
    matrices = "_".join(name.removesuffix("_MOE").split("_")[:2])
    return FileType(name, number, GGMLQuantizationType[matrices])


FILE_TYPES: dict[str, FileType] = {name.value: _file_type(name) for name in GgufType}


def find_file_type(name: str) -> FileType:
    """The file type that users call `name`; raises UnsupportedTypeError naming the known ones."""
    if name not in FILE_TYPES:
        raise UnsupportedTypeError(f"unknown GGUF type {name!r}: choose one of {', '.join(FILE_TYPES)}")
    return FILE_TYPES[name]
