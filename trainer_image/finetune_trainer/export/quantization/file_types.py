"""The GGUF file types that users name: the number in `general.file_type`, and the type that most matrices have."""

from dataclasses import dataclass

from gguf import GGMLQuantizationType, LlamaFileType

from finetune_api.vocabulary import GgufType
from finetune_trainer.export.errors import UnsupportedTypeError


@dataclass(frozen=True)
class FileType:
    """A type as users name it; `type_mixes` says which tensors differ from `matrices`."""

    name: GgufType
    number: LlamaFileType
    matrices: GGMLQuantizationType


def _file_type(name: GgufType) -> FileType:
    """Q4_K_M is a mix around Q4_K; every other type is named like its matrices."""
    number = LlamaFileType["ALL_F32" if name is GgufType.F32 else f"MOSTLY_{name}"]
    matrices = "_".join(name.split("_")[:2])
    return FileType(name, number, GGMLQuantizationType[matrices])


FILE_TYPES: dict[str, FileType] = {name.value: _file_type(name) for name in GgufType}


def find_file_type(name: str) -> FileType:
    """The file type that users call `name`; raises UnsupportedTypeError naming the known ones."""
    if name not in FILE_TYPES:
        raise UnsupportedTypeError(f"GGUF type {name!r} is not written; choose among {', '.join(FILE_TYPES)}")
    return FILE_TYPES[name]
