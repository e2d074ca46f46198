"""What each keyword of a general schema says about all values of a specific one.

The single keywords of `subsume`, without those that lead into other schemas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from app.domain.schema_facts import Facts
from app.kit.json_pointer import escape

Outcome = Literal["yes", "no", "undecided"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`yes`: every value of the specific schema fits the general one. `no`: none does, so a plan
    that joins them can never work. `undecided`: some may not; the check at run decides.

    An optional property of the wrong type is "undecided", for it may be left out. A specific schema
    that no value fits may get "yes" or "no": both are true. `pointer` is the place in the value
    that decided, `why` a sentence for people.
    """

    outcome: Outcome
    why: str = ""
    pointer: str = ""


YES = Verdict("yes")


@dataclass(frozen=True, slots=True)
class Place:
    """What a keyword's check looks at: one conjunct of the general side, all of the specific."""

    general: dict[str, Any]
    facts: Facts
    at: str
    depth: int


def every(verdicts: Iterable[Verdict]) -> Verdict:
    """All have to hold: one "no" is a no, and only all "yes" are a yes."""
    found = YES
    for verdict in verdicts:
        if verdict.outcome == "no":
            return verdict
        if found.outcome == "yes":
            found = verdict
    return found


def if_there(verdict: Verdict, is_guaranteed: bool) -> Verdict:
    """A part that may be left out can not make the whole impossible."""
    if verdict.outcome == "no" and not is_guaranteed:
        return Verdict("undecided", verdict.why, verdict.pointer)
    return verdict


_BOUNDS = {
    "minimum": (1, False),
    "exclusiveMinimum": (1, True),
    "maximum": (-1, False),
    "exclusiveMaximum": (-1, True),
}


def _bound(keyword: str, place: Place) -> Verdict:
    """An upper bound is a lower bound of the negated numbers, so there is one way to compare."""
    sign, is_strict = _BOUNDS[keyword]
    wanted = (sign * place.general[keyword], is_strict)
    given = _tightest(place.facts, sign)
    if given is not None and given >= wanted:
        return YES
    opposite = _tightest(place.facts, -sign)
    if opposite is not None:
        end = -opposite[0]
        if end < wanted[0] or (end == wanted[0] and (opposite[1] or is_strict)):
            return Verdict("no", f"is always outside {keyword}", place.at)
    return Verdict("undecided", f"may be outside {keyword}", place.at)


def _tightest(facts: Facts, sign: int) -> tuple[float, bool] | None:
    """The strongest lower bound of the numbers times `sign`, and whether it is exclusive."""
    return max(
        (
            (sign * value, is_strict)
            for keyword, (side, is_strict) in _BOUNDS.items()
            if side == sign
            for value in facts.each(keyword)
        ),
        default=None,
    )


_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def _count(keyword: str, place: Place) -> Verdict:
    wanted, facts = place.general[keyword], place.facts
    what = keyword[3:]
    least, most = facts.most(f"min{what}"), facts.least(f"max{what}")
    if what == "Items":
        most = items_max(facts)
    elif what == "Properties":
        least, most = max(least, len(facts.required)), _properties_max(facts)
    if keyword.startswith("min"):
        is_sure, is_impossible = least >= wanted, most is not None and most < wanted
    else:
        is_sure, is_impossible = most is not None and most <= wanted, least > wanted
    if is_sure:
        return YES
    if is_impossible:
        return Verdict("no", f"is always outside {keyword}", place.at)
    return Verdict("undecided", f"may be outside {keyword}", place.at)


def items_max(facts: Facts) -> int | None:
    """How many items an array can have at most, by `maxItems` or by closed `items`."""
    most = facts.least("maxItems")
    closed = [index for index in range(facts.prefix_length + 1) if facts.item(index) is False]
    return min((bound for bound in (most, *closed) if bound is not None), default=None)


def _properties_max(facts: Facts) -> int | None:
    most = facts.least("maxProperties")
    if facts.other_properties() is not False:
        return most
    possible = sum(1 for name in facts.names if facts.member(name) is not False)
    return possible if most is None else min(most, possible)


def _required(place: Place) -> Verdict:
    found = Verdict("yes")
    for name in place.general["required"]:
        below = f"{place.at}/{escape(name)}"
        if place.facts.member(name) is False:
            return Verdict("no", "is required and never there", below)
        if name not in place.facts.required:
            found = Verdict("undecided", "is required and may be missing", below)
    return found


def _pattern(place: Place) -> Verdict:
    if place.general["pattern"] in place.facts.each("pattern"):
        return YES
    return Verdict("undecided", "its pattern is checked at run", place.at)


def _multiple_of(place: Place) -> Verdict:
    wanted = place.general["multipleOf"]
    # Whole numbers are the multiples of 1. Other multiples are left to the engine, because
    # multiples of fractions depend on how it rounds.
    is_whole = wanted == 1 and "fraction" not in place.facts.types
    if is_whole or wanted in place.facts.each("multipleOf"):
        return YES
    return Verdict("undecided", "multipleOf is checked at run", place.at)


def _unique_items(place: Place) -> Verdict:
    longest = items_max(place.facts)
    is_single = longest is not None and longest <= 1
    if not place.general["uniqueItems"] or is_single or any(place.facts.each("uniqueItems")):
        return YES
    return Verdict("undecided", "items may be equal", place.at)


_SIMPLE: dict[str, Callable[[Place], Verdict]] = {
    "required": _required,
    "pattern": _pattern,
    "multipleOf": _multiple_of,
    "uniqueItems": _unique_items,
}

# Every keyword that can refuse a value of some type. Unknown keywords refuse nothing.
NO_TYPES: frozenset[str] = frozenset()
NUMBERS = frozenset({"integer", "fraction"})
_STRING = frozenset({"string"})
_ARRAY = frozenset({"array"})
_OBJECT = frozenset({"object"})
TYPES_OF_KEYWORD: dict[str, frozenset[str]] = {
    **dict.fromkeys((*_BOUNDS, "multipleOf"), NUMBERS),
    **dict.fromkeys(("minLength", "maxLength", "pattern"), _STRING),
    **dict.fromkeys(("minItems", "maxItems", "uniqueItems", "items", "prefixItems"), _ARRAY),
    **dict.fromkeys(("contains", "additionalItems", "unevaluatedItems"), _ARRAY),
    **dict.fromkeys(("required", "properties", "additionalProperties"), _OBJECT),
    **dict.fromkeys(("minProperties", "maxProperties", "patternProperties"), _OBJECT),
    **dict.fromkeys(("propertyNames", "dependentRequired", "dependentSchemas"), _OBJECT),
    **dict.fromkeys(("dependencies", "unevaluatedProperties"), _OBJECT),
}


def answer(keyword: str, place: Place) -> Verdict:
    """The verdict of a keyword that looks at the value itself; "undecided" for any other."""
    if keyword in _BOUNDS:
        return _bound(keyword, place)
    if keyword in _COUNTS:
        return _count(keyword, place)
    simple = _SIMPLE.get(keyword)
    if simple is None:
        return Verdict("undecided", f"{keyword} is checked at run", place.at)
    return simple(place)
