"""A copy of the base model in NF4 in the cache volume, so that the next job reads a quarter and quantises nothing.

A copy has the name of everything that its bytes depend on: the digest of the model's files, the settings of the
quantisation, the compute type, the kind of device that quantised, and the versions of the libraries. It is used only if
it says the same of itself and every tensor has its checksum; whatever else happens, the model is loaded from its own
files, and the log says so. Its tensors are those that bitsandbytes publishes, so transformers loads them by itself.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from finetune_kernels.streaming.host_tensors import storage_key
from finetune_trainer.errors import InterruptedRunError
from finetune_trainer.export.base_model.causal_model import load_from_tensors
from finetune_trainer.export.tensor_io.checked_tensors import (
    UNFINISHED,
    CheckedTensor,
    DamagedFileError,
    open_checked,
    write_checked,
)
from finetune_trainer.model.configuration.reading import read_language_model_config
from finetune_trainer.storage.disk_faults import explain_disk_fault
from finetune_trainer.storage.sizes import format_size

log = logging.getLogger(__name__)
FORMAT = "1"
"""Changes if copies of before must not be read any more."""
LIBRARIES = ("bitsandbytes", "transformers")
ABANDONED_SECONDS = 24 * 3600
"""Age at which an unfinished file has no writer any more."""
ContentOf = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Nf4Copies:
    """The copies of one base model in a cache."""

    folder: Path
    model_digest: str
    """SHA-256 of the model's files, as they were fetched."""
    makes: bool = True
    """True if a copy that is not there is made: by the first process of a run."""

    @classmethod
    def within(cls, cache: Path | None, model_digest: str, *, makes: bool = True) -> "Nf4Copies | None":
        """Returns the copies of a model in the folder `cache`; None without one."""
        return None if cache is None else cls(cache, model_digest, makes)

    def copy_of(self, quantization: Any, dtype: torch.dtype, device: torch.device) -> "Nf4Copy | None":
        """Returns the copy for these settings, there or not; None for weights that it has no form for: 16 bits, and
        experts, which are stacked."""
        if type(quantization) is not BitsAndBytesConfig:
            return None

        about = {
            "format": FORMAT,
            "model": self.model_digest,
            "quantization": json.dumps(quantization.to_dict(), sort_keys=True, default=str),
            "dtype": str(dtype),
            "device": device.type,
            **{library: version(library) for library in LIBRARIES},
        }
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return Nf4Copy(self.folder / f"{name}.safetensors", about, quantization, self.makes)


@dataclass(frozen=True)
class Nf4Copy:
    """One copy: of one model by one kind of quantisation."""

    path: Path
    about: Mapping[str, str]
    quantization: BitsAndBytesConfig
    is_made: bool
    """True if this process makes it where it is not there."""

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
        """Returns transformers' model of the configuration in `folder`, or None if there is no copy that can be used.

        Raises InterruptedRunError, and torch.OutOfMemoryError.
        """
        if not self.path.exists():
            return None

        begin = time.monotonic()
        try:
            model = self._load(open_checked(self.path, self.about, device), folder, device, dtype)
        except (InterruptedRunError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001 (whatever a copy costs, it is not the run)
            log.warning("the NF4 copy %s is not used: %s; the model is loaded from its own files", self.path, error)
            return None

        log.info("loaded the base model from its NF4 copy in %.1f s: %s", time.monotonic() - begin, self.path)
        return model

    def _load(
        self, tensors: Mapping[str, CheckedTensor], folder: Path, device: torch.device, dtype: torch.dtype
    ) -> Any:
        config = read_language_model_config(folder)
        config.quantization_config = self.quantization.to_dict()
        model, info = load_from_tensors(config, tensors, folder, device, dtype)
        wrong = {what: names for what, names in info.items() if names}
        if wrong:
            raise DamagedFileError(f"its tensors are not the model's: {wrong}")
        return model

    def save(self, model: Any, content_of: ContentOf | None = None) -> None:
        """Writes the copy of a model that has just been loaded from its own files. `content_of` gives a tensor's
        content, of a model some of whose layers wait in host memory. A disk that does not take it costs the copy only,
        and the log says so."""
        begin, folder = time.monotonic(), self.path.parent
        tensors: Mapping[str, torch.Tensor] = _tensors_of(model)
        if content_of is not None:
            tensors = _Contents(tensors, content_of)
        needed = sum(value.nbytes for value in tensors.values())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            if (free := shutil.disk_usage(folder).free) < needed:
                said = f"it takes {format_size(needed)}, and {format_size(free)} are free in {folder}"
                log.warning("no NF4 copy of the base model is kept: %s", said)
                return
            write_checked(self.path, tensors, self.about)
        except OSError as error:
            known = explain_disk_fault(error, folder)
            log.warning("no NF4 copy of the base model is kept: %s", error if known is None else known.message)
            return

        spent = time.monotonic() - begin
        log.info("kept a copy of the base model in NF4: %s in %.1f s, %s", format_size(needed), spent, self.path)


class _Contents(Mapping[str, torch.Tensor]):
    """Tensors whose contents are asked for one at a time."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], content_of: ContentOf) -> None:
        self._tensors, self._content_of = tensors, content_of

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._content_of(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors by name, without the other names of one that it uses twice."""
    found: dict[str, torch.Tensor] = {}
    places: set[tuple[int, int, tuple[int, ...]]] = set()
    for name, value in model.state_dict().items():
        place = storage_key(value), value.storage_offset(), tuple(value.shape)
        if not value.numel() or place not in places:
            found[name] = value
        places.add(place)
    return found


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed writers have left."""
    for path in folder.glob(f"*{UNFINISHED}"):
        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            path.unlink(missing_ok=True)
