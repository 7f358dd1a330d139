"""Base of all API models: frozen, strict about unknown fields, camelCase on the wire.

Cross-field rules are data: one `Rule` carries the CEL expression that the API server evaluates and the Python
predicate that `finetune run` evaluates, so a user reads the same message on a cluster and on a laptop. A test feeds
the same invalid manifests to both.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

Json = dict[str, Any]
"""A JSON object: a Kubernetes manifest, or a part of one."""

FieldPath = tuple[str | int, ...]
"""Place of a field in a manifest: names of fields, and positions in lists."""


@dataclass(frozen=True)
class Rule:
    """A cross-field rule in CEL and in Python.

    `cel` sees the object as `self`; `holds` gets the pydantic model. `message` names the field and says what to write
    instead.
    """

    cel: str
    holds: Callable[[Any], bool]
    message: str
    explain: Callable[[Any], str] | None = None
    """A message with the object's values. In Python only: in CEL, its estimated cost exceeds what a schema may have."""

    def broken_by(self, model: Any) -> str:
        """Return the message about a model that breaks the rule."""
        return self.explain(model) if self.explain else self.message


@dataclass(frozen=True)
class Pattern:
    """A regular expression with a message in words; annotates the type of a text field.

    Chosen over `Field(pattern=...)`, whose "should match '^...'" helps nobody. A field that also takes a number
    requires it to be positive.
    """

    regex: str
    message: str

    def check(self, value: str | int) -> str | int:
        """Return the value unchanged; raises ValueError with the message."""
        if not (re.fullmatch(self.regex, value) if isinstance(value, str) else value > 0):
            raise ValueError(self.message)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check after the type and its length."""
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Pass regex and message to `structural.py`, which turns them into a CEL rule."""
        return handler(schema) | {"pattern": self.regex, "x-message": self.message}


class ApiModel(BaseModel):
    """Base class of every API model: immutable, refuses unknown fields, camelCase names on the wire."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="strings",
        allow_inf_nan=False,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        broken = [rule.broken_by(self) for rule in self.rules if not rule.holds(self)]
        if broken:
            raise ValueError("; ".join(broken))
        return self

    def to_wire(self) -> dict[str, Any]:
        """Return JSON-ready data with camelCase names and without unset (None) fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def without_nulls(value: Any) -> Any:
    """Return JSON-like data without null fields, at any depth: a manifest leaves a field out by not writing it."""
    if isinstance(value, dict):
        return {name: without_nulls(entry) for name, entry in value.items() if entry is not None}
    return value


def _shorten(limit: int) -> BeforeValidator:
    """Cut a text for people to `limit` characters."""
    return BeforeValidator(
        lambda text: text if not isinstance(text, str) or len(text) <= limit else text[: limit - 1] + "…"
    )


# Types of what pods and trainers say. The models check these bounds, and the CRD's schema states them, so a value that
# is accepted always fits the status.
MAX_EXACT_INTEGER = 2**53 - 1
"""JSON numbers are exact up to here, and the API server refuses larger bounds of an int64."""

Count = Annotated[int, Field(ge=0, le=MAX_EXACT_INTEGER)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Time = Annotated[AwareDatetime, Field(ge=datetime(1970, 1, 1, tzinfo=UTC))]
"""A time with its zone: Kubernetes takes no other."""

MAX_MESSAGE_CHARACTERS = 2048
Name = Annotated[str, Field(max_length=256)]
Uri = Annotated[str, Field(max_length=2048)]
Word = Annotated[str, Field(max_length=256), _shorten(256)]
Message = Annotated[str, Field(max_length=MAX_MESSAGE_CHARACTERS), _shorten(MAX_MESSAGE_CHARACTERS)]
"""Text for people; a longer one is cut."""

# Kubernetes stores the seconds of a Job in an int32; JSON numbers are exact up to 2^53.
MAX_SECONDS = 2**31 - 1
MAX_COUNT = 10**12

_DNS_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
SUBDOMAIN = rf"{_DNS_LABEL}(\.{_DNS_LABEL})*"
QUALIFIED_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
ResourceName = Annotated[
    str,
    Field(min_length=1, max_length=253),
    Pattern(rf"^{SUBDOMAIN}$", "write the object's name: lower-case letters, digits, '-' and single dots"),
]

# Quantities are written as `4`, `"500m"` or `64Gi`. Zero, negative numbers and fractions of a byte are refused.
_POSITIVE = "[0-9]*[1-9][0-9]*"
_FRACTION = r"0+\.([1-9][0-9]{0,2}|0[1-9][0-9]?|00[1-9])"
_BYTE_UNIT = "(k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)"
CpuQuantity = Annotated[
    int | Annotated[str, Field(max_length=32)],
    Pattern(rf"^({_POSITIVE}(m|\.[0-9]{{1,3}})?|{_FRACTION})$", "write a positive number of cores, such as 4 or 500m"),
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
]
ByteQuantity = Annotated[
    int | Annotated[str, Field(max_length=32)],
    Pattern(
        rf"^({_POSITIVE}((\.[0-9]{{1,3}})?{_BYTE_UNIT})?|{_FRACTION}{_BYTE_UNIT})$",
        "write a positive number of bytes with a unit, such as 32Gi",
    ),
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
]
