"""The shape every API model shares: frozen, strict about unknown fields, camelCase on the wire.

Cross-field rules are data: one `Rule` carries the CEL expression that the API server evaluates and the Python
predicate that `finetune run` evaluates, so both doors give the same message. A test feeds the same invalid manifests
to both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel


@dataclass(frozen=True)
class Rule:
    """A cross-field rule in both of its languages.

    `cel` sees the object as `self`; `holds` gets the pydantic model. `message` names the field and says what to write
    instead.
    """

    cel: str
    holds: Callable[[Any], bool]
    message: str


class ApiModel(BaseModel):
    """Base of every model of the API: immutable, unknown fields refused, names in camelCase."""

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
        broken = [rule.message for rule in self.rules if not rule.holds(self)]
        if broken:
            raise ValueError("; ".join(broken))
        return self

    def to_wire(self) -> dict[str, Any]:
        """The model as JSON-ready data with camelCase names, without unset (None) fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


# A Kubernetes quantity: users write `4`, `"500m"` or `64Gi`; the schema marks it int-or-string.
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$"
Quantity = Annotated[
    int | Annotated[str, Field(pattern=QUANTITY_PATTERN, max_length=32)],
    Field(json_schema_extra={"x-kubernetes-int-or-string": True, "pattern": QUANTITY_PATTERN}),
]

CPU_PATTERN = r"^[0-9]+(\.[0-9]+)?m?$"
CpuQuantity = Annotated[
    int | Annotated[str, Field(pattern=CPU_PATTERN, max_length=32)],
    Field(json_schema_extra={"x-kubernetes-int-or-string": True, "pattern": CPU_PATTERN}),
]

DNS_LABEL_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
ResourceName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", min_length=1, max_length=253)]
