"""Conversion of pydantic's JSON schema into a structural schema that the API server accepts.

The differences: references are inlined, an optional field is absent rather than null, `exclusiveMinimum` is a flag,
and a pattern becomes a CEL rule with a message in words.
"""

from typing import Any

from pydantic import BaseModel

from finetune_api.base import ApiModel, Rule, without_nulls

Schema = dict[str, Any]
KEPT = (
    "description", "enum", "format", "pattern", "minLength", "maxLength", "minItems", "maxItems", "maxProperties",
    "default", "x-kubernetes-int-or-string", "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
)  # fmt: skip
MAX_QUANTITY_CHARACTERS = 32  # characters; without a bound the API server refuses the rule as too costly


def structural_schema(model: type[BaseModel], *, defaults: bool = True) -> Schema:
    """Build the structural schema of a model.

    `defaults=False` is for the status: the server must not fill in what nobody reported."""
    document = model.model_json_schema(by_alias=True)
    return _convert(document, document.get("$defs", {}), _rules_by_title(model), defaults)


def validations(rules: tuple[Rule, ...]) -> list[dict[str, str]]:
    """Convert rules to `x-kubernetes-validations`."""
    return [{"rule": rule.cel, "message": rule.message} for rule in rules]


def _rules_by_title(model: type[BaseModel]) -> dict[str, tuple[Rule, ...]]:
    """Rules of every subclass of `ApiModel`, keyed by class name, which is the title in the JSON schema."""
    found: dict[str, tuple[Rule, ...]] = {}
    pending: list[type[ApiModel]] = [ApiModel]
    while pending:
        known = pending.pop()
        found[known.__name__] = known.rules
        pending.extend(known.__subclasses__())
    return found


def _convert(
    node: Schema, definitions: dict[str, Schema], rules: dict[str, tuple[Rule, ...]], defaults: bool
) -> Schema:
    node = _resolve(node, definitions)
    made: Schema = {key: node[key] for key in KEPT if key in node}
    if "description" in made:
        made["description"] = " ".join(made["description"].split())

    # A quantity is a number or a text: its pattern applies to the text only.
    if node.get("x-kubernetes-int-or-string"):
        written = _matches("self", made.pop("pattern"))
        rule = {"rule": f"type(self) == int ? self > 0 : {written}", "message": node["x-message"]}
        made |= {"maxLength": MAX_QUANTITY_CHARACTERS, "x-kubernetes-validations": [rule]}
        if not defaults or made.get("default", ...) is None:
            made.pop("default", None)
        return made

    kind = made["type"] = node.get("type", "string")
    _convert_bounds(node, made)
    if kind == "integer":
        made["format"] = "int64"
    elif kind == "array":
        made["items"] = _convert(node.get("items", {}), definitions, rules, defaults)
    elif kind == "object":
        _convert_object(node, made, definitions, rules, defaults)

    if "const" in node:
        made["enum"] = [node["const"]]
    if "x-message" in node:
        made["x-kubernetes-validations"] = [
            {"rule": _matches("self", made.pop("pattern")), "message": node["x-message"]}
        ]
    if not defaults or made.get("default", ...) is None:
        made.pop("default", None)
    return made


def _convert_object(
    node: Schema, made: Schema, definitions: dict[str, Schema], rules: dict[str, tuple[Rule, ...]], defaults: bool
) -> None:
    if made.get("default"):
        made["default"] = without_nulls(made["default"])
    if "properties" in node:
        made["properties"] = {
            name: _convert(field, definitions, rules, defaults) for name, field in node["properties"].items()
        }
        if node.get("required"):
            made["required"] = node["required"]
        if own := rules.get(node.get("title", ""), ()):
            made["x-kubernetes-validations"] = validations(own)
    elif "patternProperties" in node:
        ((pattern, values),) = node["patternProperties"].items()
        made["additionalProperties"] = _convert(values, definitions, rules, defaults)
        keys = node["propertyNames"]
        rule = f"self.all(key, size(key) <= {keys['maxLength']} && {_matches('key', pattern)})"
        made["x-kubernetes-validations"] = [{"rule": rule, "message": keys["x-message"]}]
    elif isinstance(node.get("additionalProperties"), dict):
        made["additionalProperties"] = _convert(node["additionalProperties"], definitions, rules, defaults)


def _matches(variable: str, pattern: str) -> str:
    """CEL expression that matches a pattern."""
    return f'{variable}.matches(r"{pattern}")'


def _convert_bounds(node: Schema, made: Schema) -> None:
    for name, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if name in node:
            made[name] = node[name]
        elif exclusive in node:
            made[name], made[exclusive] = node[exclusive], True


def _resolve(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """Follow references and take the non-null branch of an optional field; the field's own description wins."""
    while True:
        if "$ref" in node:
            target = definitions[node["$ref"].rsplit("/", 1)[-1]]
        elif branches := [branch for branch in node.get("anyOf", []) if branch.get("type") != "null"]:
            if len(branches) > 1:
                return {key: value for key, value in node.items() if key != "anyOf"}
            target = branches[0]
        else:
            return node
        node = target | {key: value for key, value in node.items() if key not in ("$ref", "anyOf", "title")}
