"""Messages of the rules in a schema, each of which a test has to see."""

from typing import Any


def messages(schema: dict[str, Any]) -> set[str]:
    """Messages of every rule in a structural schema."""
    found = {rule["message"] for rule in schema.get("x-kubernetes-validations", ())}
    below = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
    return found.union(*(messages(node) for node in below if isinstance(node, dict)))
