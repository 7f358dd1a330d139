"""Source URIs of models and datasets: four schemes.

hf://org/name                 a repository of the Hugging Face Hub (with `revision`)
s3://bucket/path              an object, or every object below a prefix ending in `/`
pvc://claim/path              a path inside a PersistentVolumeClaim of the job's namespace, mounted read-only
file:///path                  a path on this machine: `finetune run` only, the cluster refuses it
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field

from finetune_api.base import SUBDOMAIN, Pattern


class Scheme(StrEnum):
    """Scheme of a source URI."""

    HUGGING_FACE = "hf"
    S3 = "s3"
    PVC = "pvc"
    FILE = "file"


SOURCE_PATTERN = (
    r"^(hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*"
    r"|s3://[a-z0-9][a-z0-9.-]+[a-z0-9]/[^\x00-\x1f\\]+"
    rf"|pvc://{SUBDOMAIN}(/[^\x00-\x1f\\]*)?"
    r"|file:///[^\x00-\x1f\\]+)$"
)
SOURCE_MESSAGE = (
    "write hf://org/name, s3://bucket/path or pvc://claim/path (a path of your own machine goes with `finetune run` "
    "only)"
)
SourceUri = Annotated[str, Field(max_length=1024), Pattern(SOURCE_PATTERN, SOURCE_MESSAGE)]


@dataclass(frozen=True)
class Source:
    """A parsed source URI: `location` is the repository, bucket or claim, and `path` the rest without a leading slash
    (with it for file://)."""

    scheme: Scheme
    location: str
    path: str

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Split a URI that `SOURCE_PATTERN` has accepted."""
        scheme, _, rest = uri.partition("://")
        if scheme == Scheme.FILE:
            return cls(Scheme.FILE, "", rest)
        if scheme == Scheme.HUGGING_FACE:
            return cls(Scheme.HUGGING_FACE, rest, "")
        location, _, path = rest.partition("/")
        return cls(Scheme(scheme), location, path)

    @property
    def hub_name(self) -> str | None:
        """org/name of a repository on the Hugging Face Hub; None for other sources."""
        return self.location if self.scheme is Scheme.HUGGING_FACE else None


def stays_inside(uri: str) -> bool:
    """Return True if no path segment of the URI is `..`."""
    return ".." not in uri.split("/")
