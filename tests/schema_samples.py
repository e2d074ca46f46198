"""Random JSON Schemas and values that often meet: for tests that hold a claim against the engine.

Plain `random` from a seed, because hypothesis spends most of its time on drawing such structures;
hypothesis draws the seeds and names the one that failed.
"""

from __future__ import annotations

import random
from typing import Any

NAMES = ["a", "b", "c"]
TYPES = ["null", "boolean", "object", "array", "string", "integer", "number"]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 1.0, 1.5, 2, 3, -1, "", "x", "yy", "zzz"),
    *([], [1], [1, 1], ["x"], [1, "x", None]),
    *({}, {"a": 1}, {"a": "x"}, {"b": 1}, {"a": 1, "b": "x"}, {"a": {"a": 1}}, {"c": None}),
]
BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


class Samples:
    """One stream of schemas and values, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def maybe(self, chance: float) -> bool:
        return self.random.random() < chance

    def value(self, depth: int = 3) -> Any:
        if depth == 0 or self.maybe(0.5):
            return self.random.choice(VALUES)
        if self.maybe(0.5):
            return [self.value(depth - 1) for _ in range(self.random.randint(0, 3))]
        return {name: self.value(depth - 1) for name in NAMES if self.maybe(0.5)}

    def document(self) -> dict[str, Any]:
        """A schema whose `#/$defs/d` exists."""
        return {**self._keywords(3), "$defs": {"d": self.schema(1)}}

    def pair(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Two documents; in a third of the pairs the first is a looser version of the second."""
        specific = self.document()
        if self.maybe(0.66):
            return self.document(), specific
        kept = {key: value for key, value in specific.items() if self.maybe(0.7)}
        return {**kept, "$defs": specific["$defs"]}, specific

    def schema(self, depth: int = 3) -> Any:
        if self.maybe(0.06):
            return self.maybe(0.66)
        return self._keywords(depth)

    def _keywords(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._say_type_and_values(found)
        self._say_sizes(found)
        if depth > 0:
            self._say_parts(found, depth - 1)
            self._say_combinations(found, depth - 1)
        return found

    def _say_type_and_values(self, found: dict[str, Any]) -> None:
        pick = self.random
        if self.maybe(0.75):
            several = self.maybe(0.25)
            found["type"] = pick.sample(TYPES, 2) if several else pick.choice(TYPES)
        if self.maybe(0.08):
            found["enum"] = [pick.choice(VALUES) for _ in range(pick.randint(1, 3))]
        if self.maybe(0.04):
            found["const"] = pick.choice(VALUES)

    def _say_sizes(self, found: dict[str, Any]) -> None:
        pick = self.random
        for keyword in BOUNDS:
            if self.maybe(0.1):
                found[keyword] = pick.choice([-1, 0, 1, 1.5, 2, 3])
        for keyword in COUNTS:
            if self.maybe(0.08):
                found[keyword] = pick.randint(0, 3)
        if self.maybe(0.05):
            found["multipleOf"] = pick.choice([0.5, 1, 2])
        if self.maybe(0.05):
            found["uniqueItems"] = self.maybe(0.5)
        if self.maybe(0.04):
            found["pattern"] = pick.choice(["^x", "y"])
        if self.maybe(0.25):
            found["required"] = pick.sample(NAMES, pick.randint(0, 2))
        if self.maybe(0.02):
            found["dependentRequired"] = {"a": ["b"]}

    def _say_parts(self, found: dict[str, Any], depth: int) -> None:
        pick = self.random
        if self.maybe(0.3):
            names = pick.sample(NAMES, pick.randint(1, 2))
            found["properties"] = {name: self.schema(depth) for name in names}
        if self.maybe(0.15):
            found["additionalProperties"] = self.schema(depth) if self.maybe(0.5) else False
        if self.maybe(0.04):
            found["patternProperties"] = {"^a": self.schema(depth)}
        if self.maybe(0.15):
            found["items"] = self.schema(depth)
        if self.maybe(0.06):
            found["prefixItems"] = self._some(depth)
        for keyword in ("contains", "propertyNames"):
            if self.maybe(0.02):
                found[keyword] = self.schema(depth)
        for keyword in ("unevaluatedProperties", "unevaluatedItems"):
            if self.maybe(0.02):
                found[keyword] = False

    def _say_combinations(self, found: dict[str, Any], depth: int) -> None:
        for keyword in ("allOf", "anyOf", "oneOf"):
            if self.maybe(0.06):
                found[keyword] = self._some(depth)
        if self.maybe(0.04):
            found["not"] = self.schema(depth)
        for keyword in ("if", "then", "else"):
            if self.maybe(0.02):
                found[keyword] = self.schema(depth)
        if self.maybe(0.05):
            found["$ref"] = "#/$defs/d"

    def _some(self, depth: int) -> list[Any]:
        return [self.schema(depth) for _ in range(self.random.randint(1, 2))]
