"""Result locations: where in its bucket a job writes, by the administrator's template and the job's own prefix.

Two jobs must never share a location: the operator resolves the template, which by default holds namespace and name, and
nothing that a user writes can leave it out.
"""

import re
from dataclasses import dataclass

PLACEHOLDERS = ("namespace", "name", "uid")
_PLACEHOLDER = re.compile(r"\{(" + "|".join(PLACEHOLDERS) + r")\}")
_LITERAL = re.compile(r"[A-Za-z0-9!_.*'()/-]*")
"""What `spec.output.s3.prefix` may hold, too."""


@dataclass(frozen=True)
class LocationTemplate:
    """The layout of a bucket below `spec.output.s3.prefix`. Raises ValueError for one that is no plain relative path,
    or that names neither the job nor its UID."""

    text: str = "{namespace}/{name}"

    def __post_init__(self) -> None:
        """Checks the template."""
        if not _LITERAL.fullmatch(_PLACEHOLDER.sub("", self.text)):
            known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise ValueError(f"write letters, digits, ! _ . * ' ( ) / - and the placeholders {known}")
        if {"", ".", ".."} & set(self.text.split("/")):
            raise ValueError("write a plain relative path, without '.', '..', '//' and without '/' at either end")
        if not {"name", "uid"} & set(_PLACEHOLDER.findall(self.text)):
            raise ValueError("write {name} or {uid} in it, so that each job has a place of its own")

    def resolve(self, prefix: str, *, namespace: str, name: str, uid: str) -> str:
        """Returns the prefix of every key that a job writes, without a slash at either end."""
        values = {"namespace": namespace, "name": name, "uid": uid}
        own = _PLACEHOLDER.sub(lambda found: values[found[1]], self.text)
        return f"{prefix.strip('/')}/{own}".lstrip("/")


DEFAULT_TEMPLATE = LocationTemplate()


def attempt_name(job_uid: str, pod_uid: str) -> str:
    """Returns the name of what one pod of a job writes: nobody else writes, or clears away, below such a name."""
    return f"{job_uid}.{pod_uid}"


def attempt_prefix(name: str) -> str:
    """Returns the prefix, in the result location, of everything that an attempt uploads for a result."""
    return f"attempts/{name}/"


def location_uri(bucket: str, output_prefix: str) -> str:
    """Returns the address of a result location, with a slash at its end."""
    return f"s3://{bucket}/{output_prefix}/"
