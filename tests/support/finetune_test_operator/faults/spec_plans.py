"""Plans about what users write: every property of the CRD's schema left out, changed, at its bounds and wrong.

A plan is one edit at one place of a job that has every field: `spec.training.epochs/above`. What the API server says to
it is not foretold. It must say something that helps, or take the job, and then the operator must come to terms with it.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from finetune_api.base import Json

GROWN: Final = 70_000  # characters or items, where the schema sets no bound
SHORT: Final = 0.001  # by which numbers are beyond a bound that is not a whole number
_WRONG_TYPES: Final[dict[str, Any]] = {
    "string": 7,
    "integer": "seven",
    "number": "seven",
    "boolean": "perhaps",
    "array": {"a": 1},
    "object": "text",
}


@dataclass(frozen=True)
class SpecPlan:
    """One edit of one place of a spec."""

    path: tuple[str, ...]
    edit: str
    value: Any = None
    """What is written there; for the edit `deleted`, nothing is."""

    @property
    def name(self) -> str:
        """Place and edit, for people."""
        return f"spec.{'.'.join(self.path)}/{self.edit}"

    def apply(self, spec: Json) -> Json:
        """Returns the edited copy of a spec."""
        edited = copy.deepcopy(spec)
        place = edited
        for step in self.path[:-1]:
            place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
        if self.edit == "deleted":
            place.pop(self.path[-1], None)
        else:
            place[self.path[-1]] = self.value
        return edited


def generate_spec_plans(schema: Json, spec: Json) -> list[SpecPlan]:
    """Every edit of every place of the schema of a spec; `spec` has every field."""
    return list(_plans_of(schema, spec, ()))


def _plans_of(schema: Json, now: Any, path: tuple[str, ...]) -> Iterator[SpecPlan]:
    for name, field in schema.get("properties", {}).items():
        place, value = (*path, name), now.get(name) if isinstance(now, dict) else None
        yield SpecPlan(place, "deleted")
        yield SpecPlan(place, "null", None)
        yield from (SpecPlan(place, edit, value) for edit, value in _edits(field, value))
        yield from _plans_of(field, value, place)

        if "properties" in field.get("items", {}) and value:
            yield from _plans_of(field["items"], value[0], (*place, "0"))
    if path and "properties" in schema:
        yield SpecPlan((*path, "unheardOf"), "unknown", 1)


def _edits(field: Json, now: Any) -> Iterator[tuple[str, Any]]:
    kind = field.get("type", "quantity")
    if kind in _WRONG_TYPES:
        yield "wrong type", _WRONG_TYPES[kind]
    if "enum" in field:
        yield from ((f"changed to {each}", each) for each in field["enum"] if each != now)
        yield "another word", "Nonsense"
    elif kind in ("integer", "number"):
        yield from _numbers(field, kind)
    elif kind == "string":
        yield from _texts(field, now)
    elif kind == "boolean":
        yield "changed", not now
    elif kind == "array":
        yield from _lists(field, now)
    elif kind == "object":
        yield "empty", {}
        if "additionalProperties" in field:
            yield "most", {f"a{number}": "b" for number in range(field.get("maxProperties", GROWN))}
            yield "above", {f"a{number}": "b" for number in range(field.get("maxProperties", GROWN) + 1)}
    elif kind == "quantity":
        yield from (("zero", 0), ("below", "-1"), ("least", "1m"), ("most", "1000000Ei"), ("no quantity", "many"))


def _numbers(field: Json, kind: str) -> Iterator[tuple[str, Any]]:
    step = 1 if kind == "integer" else SHORT
    least, most = field.get("minimum"), field.get("maximum")
    if least is not None:
        yield "least", least + step if field.get("exclusiveMinimum") else least
        yield "below", least if field.get("exclusiveMinimum") else least - step
    if most is not None:
        yield "most", most - step if field.get("exclusiveMaximum") else most
        yield "above", most if field.get("exclusiveMaximum") else most + step
    yield "far above", 10**30


def _texts(field: Json, now: Any) -> Iterator[tuple[str, Any]]:
    most = field.get("maxLength", GROWN)
    grown = str(now or "a")
    yield "empty", ""
    yield "changed", f"{grown}x"
    yield "most", grown + "x" * (most - len(grown))
    yield "above", grown + "x" * (most + 1 - len(grown))
    yield "blank", " "
    yield "foreign", "\N{PARTY POPPER}\n\t\0"


def _lists(field: Json, now: Any) -> Iterator[tuple[str, Any]]:
    one = (now or ["a"])[0]
    yield "empty", []
    yield "twice the same", [one, one]
    yield "above", [one] * (field.get("maxItems", GROWN) + 1)
    yield "of nothing", [None]
