"""Does every value of one schema fit another? Decided on a fragment of JSON Schema, and soundly.

The fragment: type, enum, const, properties, required, additionalProperties, min/maxProperties,
items, prefixItems, min/maxItems, uniqueItems, bounds of numbers and lengths, equal `pattern` and
`multipleOf`, true and false, allOf, anyOf, oneOf, not, and local `$ref`. Annotations (title,
description, default, format …) are ignored. What lies outside makes the answer "undecided", never
wrong: of the specific schema only necessary conditions are used (see `schema_facts`), so leaving a
keyword out there widens the set of values; of the general schema every keyword must be answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from app.domain.json_schema import compile_derived
from app.domain.schema_facts import Facts, gather, types_of
from app.domain.schema_keywords import (
    NO_TYPES,
    NUMBERS,
    TYPES_OF_KEYWORD,
    YES,
    Place,
    Verdict,
    answer,
    every,
    if_there,
    items_max,
)
from app.domain.schema_shape import Schema, has_reference, referenced, standing_alone
from app.kit.json_pointer import escape, is_index, tokens

__all__ = ["Located", "Verdict", "lookup", "subsumes"]

# Schemas that branch against each other multiply; past this much work the answer is "undecided".
STEPS_MAX = 2_000
DEPTH_MAX = 40
BRANCHES_MAX = 2_000
VALUES_MAX = 500


@dataclass(frozen=True, slots=True)
class Located:
    """The part of a schema for one place in its values.

    `absent`: no value has anything there; `undecided`: the schema says nothing of that place. The
    value there fits `schema`, whose references resolve against the schema that was searched.
    `is_guaranteed`: every value has something there.
    """

    outcome: Literal["found", "absent", "undecided"]
    schema: Schema
    is_guaranteed: bool


def subsumes(
    general: Schema,
    specific: Schema,
    *,
    general_root: Schema | None = None,
    specific_root: Schema | None = None,
) -> Verdict:
    """Whether every value of `specific` fits `general`.

    A root is the document that local references resolve against; without one the schema is its own.
    Both must be parts of schemas that have compiled.
    """
    search = _Search(
        general if general_root is None else general_root,
        specific if specific_root is None else specific_root,
    )
    return search.compare(general, specific, "", 0)


def lookup(schema: Schema, pointer: str) -> Located:
    """The part of a schema for a JSON pointer into its values, such as "/brief/title".

    Raises `PointerMissing` for a malformed pointer.
    """
    found = Located("found", schema, is_guaranteed=True)
    for token in tokens(pointer):
        below = _step(schema, found.schema, token, BRANCHES_MAX)
        if below.outcome == "absent":
            return below
        sure = found.is_guaranteed and below.is_guaranteed
        found = Located(below.outcome, below.schema, sure)
    return found


def _step(root: Schema, schema: Schema, token: str, budget: int) -> Located:
    """One step down: an object's property or an array's item. `budget`: branches to look at."""
    facts = gather(root, schema)
    types = facts.types & ({"object", "array"} if is_index(token) else {"object"})
    if facts.is_never or not types:
        return Located("absent", False, is_guaranteed=False)
    found = _member(facts, token, types)
    # Halved at every level, so that a union of itself ends soon too.
    share = budget // max(2 * sum(map(len, facts.unions)), 1)
    # Without the budget to look at its branches a union says nothing: that is sound.
    for branches in facts.unions if share else ():
        found = _both(found, [_step(root, branch, token, share) for branch in branches])
    return found


def _member(facts: Facts, token: str, types: frozenset[str]) -> Located:
    """What the conjuncts alone say of a member."""
    if types == {"object"}:
        below, is_there = facts.member(token), token in facts.required
    elif types == {"array"}:
        below, is_there = facts.item(int(token)), facts.most("minItems") > int(token)
    else:
        return Located("undecided", True, is_guaranteed=False)
    if below is False:
        return Located("absent", False, is_guaranteed=False)
    outcome: Literal["found", "undecided"] = "undecided" if below is True else "found"
    return Located(outcome, below, is_there and facts.types == types)


def _both(found: Located, branches: list[Located]) -> Located:
    """What holds when `found` does and one of the branches does too."""
    possible = [branch for branch in branches if branch.outcome != "absent"]
    if found.outcome == "absent" or not possible:
        return Located("absent", False, is_guaranteed=False)
    sure = found.is_guaranteed or all(branch.is_guaranteed for branch in branches)
    if any(branch.outcome == "undecided" for branch in possible):
        return Located(found.outcome, found.schema, sure)
    either: Schema = {"anyOf": [branch.schema for branch in possible]}
    schema = either if found.schema is True else {"allOf": [found.schema, either]}
    return Located("found", schema, sure)


class _Search:
    """One question. `general` and `specific` are the roots of the two sides."""

    def __init__(self, general: Schema, specific: Schema) -> None:
        self._general = general
        self._specific = specific
        self._steps = 0

    def compare(self, general: Schema, specific: Schema, at: str, depth: int) -> Verdict:
        self._steps += 1
        if self._steps > STEPS_MAX or depth > DEPTH_MAX:
            return Verdict("undecided", "the schemas are too intricate to compare", at)
        facts = gather(self._specific, specific)
        self._steps += len(facts.conjuncts) // 4
        if general is True or facts.is_never or self._are_equal(general, specific):
            return YES
        if general is False:
            return Verdict("no", "nothing is allowed here", at)
        values = self._values_of(specific, facts)
        if values is not None:
            return self._compare_values(general, values, at)
        found = every(self._answers(general, specific, facts, at, depth))
        for branches in facts.unions:
            if found.outcome == "undecided":
                decided = self._compare_union(general, branches, at, depth)
                found = decided if decided.outcome != "undecided" else found
        return found

    def _compare_union(
        self, general: Schema, branches: list[Schema], at: str, depth: int
    ) -> Verdict:
        """The specific side is one of several: what holds for each of them holds."""
        found = [self.compare(general, branch, at, depth + 1) for branch in branches]
        outcomes = {verdict.outcome for verdict in found}
        if len(outcomes) == 1:
            return found[0]
        return Verdict("undecided", "only some of the alternatives fit", at)

    def _are_equal(self, general: Schema, specific: Schema) -> bool:
        # Python holds 1 and true for equal; the canonical texts differ.
        if general != specific or _text(general) != _text(specific):
            return False
        return self._general is self._specific or not (
            has_reference(general) and _text(self._general) != _text(self._specific)
        )

    def _values_of(self, specific: Schema, facts: Facts) -> list[Any] | None:
        """All values of the specific schema when they can be listed."""
        listed: list[Any] | None = None
        for schema in facts.conjuncts:
            if "const" in schema:
                listed = [schema["const"]]
            elif "enum" in schema:
                listed = schema["enum"]
        if listed is None and facts.types <= {"null", "boolean"}:
            listed = [None, True, False]
        if listed is None or len(listed) > VALUES_MAX:
            return None
        fits = self._check_of(specific, self._specific)
        return [value for value in listed if fits(value)]

    def _check_of(self, schema: Schema, root: Schema) -> Callable[[Any], bool]:
        # Compiling is dear, all the more with a copy of the root to resolve references in.
        self._steps += STEPS_MAX // 20 if has_reference(schema) else STEPS_MAX // 200
        return compile_derived(standing_alone(schema, root)).is_valid

    def _compare_values(self, general: Schema, values: list[Any], at: str) -> Verdict:
        fits = self._check_of(general, self._general)
        fitting = sum(1 for value in values if fits(value))
        if fitting == len(values):
            return YES
        if fitting == 0:
            return Verdict("no", "none of the possible values is allowed", at)
        return Verdict("undecided", "not all of the possible values are allowed", at)

    def _answers(
        self, general: dict[str, Any], specific: Schema, facts: Facts, at: str, depth: int
    ) -> Iterator[Verdict]:
        """One verdict for every keyword of the general schema; all of them have to hold."""
        allowed = types_of(general)
        live = facts.types & allowed
        if not live:
            wanted, given = _listed(allowed), _listed(facts.types)
            yield Verdict("no", f"wants {wanted}, gets {given}", at)
        elif not facts.types <= allowed:
            yield Verdict("undecided", f"may be {_listed(facts.types - allowed)}", at)
        place = Place(general, facts, at, depth)
        for keyword, value in general.items():
            touched = TYPES_OF_KEYWORD.get(keyword, NO_TYPES)
            if keyword in _COMBINING:
                yield _COMBINING[keyword](self, value, specific, at, depth)
            elif live & touched:
                verdict = self._answer(keyword, place)
                # Values of other types do not mind the keyword and may still fit.
                if verdict.outcome == "no" and not live <= touched:
                    verdict = Verdict("undecided", verdict.why, verdict.pointer)
                yield verdict

    def _answer(self, keyword: str, place: Place) -> Verdict:
        partner = _PARTNERS.get(keyword)
        if partner in place.general:
            # The two are one question; it is answered where the partner stands.
            return YES
        if keyword in ("properties", "additionalProperties"):
            return self._properties(place)
        if keyword in ("items", "prefixItems"):
            return self._items(place)
        return answer(keyword, place)

    def _properties(self, place: Place) -> Verdict:
        general, facts = place.general, place.facts
        declared = general.get("properties", {})
        # With patterns it is not known which names are additional; they are undecided anyway.
        open_to_all = "patternProperties" in general
        rest: Schema = True if open_to_all else general.get("additionalProperties", True)
        found = []
        for name in sorted(declared.keys() | facts.names | facts.required):
            wanted: Schema = declared.get(name, rest)
            given = facts.member(name)
            below = f"{place.at}/{escape(name)}"
            verdict = self.compare(wanted, given, below, place.depth + 1)
            found.append(if_there(verdict, name in facts.required))
        other = self.compare(rest, facts.other_properties(), place.at, place.depth + 1)
        found.append(if_there(other, False))
        return every(found)

    def _items(self, place: Place) -> Verdict:
        general, facts = place.general, place.facts
        prefix = general.get("prefixItems", ())
        length = max(len(prefix), facts.prefix_length)
        longest = items_max(facts)
        found = []
        for index in range(length + 1):
            if longest is not None and index >= longest:
                break
            rest: Schema = general.get("items", True)
            wanted = prefix[index] if index < len(prefix) else rest
            given = facts.item(index)
            verdict = self.compare(wanted, given, f"{place.at}/{index}", place.depth + 1)
            found.append(if_there(verdict, facts.most("minItems") > index))
        return every(found)

    def _all_of(self, wanted: Any, specific: Schema, at: str, depth: int) -> Verdict:
        return every(self.compare(branch, specific, at, depth + 1) for branch in wanted)

    def _any_of(self, wanted: Any, specific: Schema, at: str, depth: int) -> Verdict:
        found = [self.compare(branch, specific, at, depth + 1).outcome for branch in wanted]
        if "yes" in found:
            return YES
        if "undecided" in found:
            return Verdict("undecided", "it is not sure that one of the alternatives fits", at)
        return Verdict("no", "fits none of the alternatives", at)

    def _one_of(self, wanted: Any, specific: Schema, at: str, depth: int) -> Verdict:
        found = [self.compare(branch, specific, at, depth + 1).outcome for branch in wanted]
        if sorted(found) == ["no"] * (len(found) - 1) + ["yes"]:
            return YES
        if set(found) == {"no"}:
            return Verdict("no", "fits none of the alternatives", at)
        return Verdict("undecided", "it is not sure that exactly one alternative fits", at)

    def _not(self, unwanted: Any, specific: Schema, at: str, depth: int) -> Verdict:
        outcome = self.compare(unwanted, specific, at, depth + 1).outcome
        if outcome == "undecided":
            return Verdict("undecided", "it is not sure that the excluded does not fit", at)
        return YES if outcome == "no" else Verdict("no", "is excluded", at)

    def _reference(self, reference: Any, specific: Schema, at: str, depth: int) -> Verdict:
        target = referenced(self._general, reference)
        if target is None:
            return Verdict("undecided", "a reference leads nowhere", at)
        return self.compare(target, specific, at, depth + 1)

    def _listed_values(self, wanted: Any, specific: Schema, at: str, depth: int) -> Verdict:
        """The general side lists its values, the specific one has more than can be listed."""
        if len(wanted) <= VALUES_MAX:
            fits = self._check_of(specific, self._specific)
            if not any(fits(value) for value in wanted):
                return Verdict("no", "none of the allowed values is possible", at)
        return Verdict("undecided", "only some values are allowed", at)

    def _constant(self, wanted: Any, specific: Schema, at: str, depth: int) -> Verdict:
        return self._listed_values([wanted], specific, at, depth)

    def _condition(self, wanted: Any, specific: Schema, at: str, depth: int) -> Verdict:
        return Verdict("undecided", "if is checked at run", at)


_PARTNERS = {"additionalProperties": "properties", "items": "prefixItems"}
_COMBINING: dict[str, Callable[[_Search, Any, Schema, str, int], Verdict]] = {
    "allOf": _Search._all_of,
    "anyOf": _Search._any_of,
    "oneOf": _Search._one_of,
    "not": _Search._not,
    "$ref": _Search._reference,
    "enum": _Search._listed_values,
    "const": _Search._constant,
    "if": _Search._condition,
}


def _listed(types: frozenset[str]) -> str:
    """Types for people: both sorts of numbers together are "number"."""
    shown = set(types)
    if shown >= NUMBERS:
        shown = (shown - NUMBERS) | {"number"}
    elif "fraction" in shown:
        shown = (shown - NUMBERS) | {"a number that is not whole"}
    return " or ".join(sorted(shown)) or "nothing"


def _text(schema: Schema) -> bytes:
    return orjson.dumps(schema, option=orjson.OPT_SORT_KEYS)
