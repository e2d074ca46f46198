"""Compiling and running JSON Schema 2020-12: the only door to the engine (jsonschema-rs).

A schema is a program that a stranger wrote. Here it gets no network and no files (every reference
out of the document is refused, twice), regular expressions in linear time, and bounds on its size,
its depth and the work it can cause. `format` is an annotation, as the standard has it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Never

import jsonschema_rs
import orjson

from app.domain.errors import ContractError, Fault
from app.domain.schema_shape import (
    SCHEMA_KEYWORDS,
    Schema,
    Shape,
    follow,
    measure,
    standing_alone,
)
from app.kit.json_gate import DEFAULT_LIMITS, JsonLimits, JsonRefused, check_value
from app.kit.json_pointer import escape

SCHEMA_BYTES_MAX = 256 * 1024
VIOLATIONS_MAX = 20
MESSAGE_CHARS_MAX = 300
POINTER_CHARS_MAX = 1_000
# Bytes one compiled pattern may take. Enough for a few dozen repeats of a Unicode class.
PATTERN_BYTES_MAX = 2 * 1024 * 1024
# The engine copies the value into every error it finds and finds all of them at once, so its work
# is bounded by values x sub-schemas (errors) x values (the copy in each): 0.3 s at the very worst.
DETAIL_ERRORS_MAX = 20_000
DETAIL_WORK_MAX = 2_000_000
_CHARS_PER_WEIGHT = 16
# Sub-schemas x values of one check; about a second of the engine's time at the very worst.
CHECK_WORK_MAX = 100_000_000
_COST_LIGHT = 500
# A contract has at most 200 facets, each within the limits.
_SLACK = 256
_DERIVED_LIMITS = JsonLimits(depth_max=72)
CACHE_WEIGHT_MAX = 16 * 1024 * 1024
_PATTERN_WEIGHT = 64 * 1024


@dataclass(frozen=True, slots=True)
class Violation:
    """One way in which a value breaks a schema; `pointer` is the place in the value.

    For `required` the pointer names the missing property. The message never quotes the value, but
    for names of properties.
    """

    pointer: str
    message: str
    keyword: str


@dataclass(frozen=True, slots=True)
class Validator:
    """A compiled schema. Values must have passed the JSON gate: at most 64 deep, only JSON types.

    Deeper values could end the process: the engine recurses on the native stack.
    """

    schema: Schema
    shape: Shape
    _engine: jsonschema_rs.Validator = field(repr=False)

    def is_valid(self, value: Any) -> bool:
        """Whether the value fits; well under a microsecond for small values.

        A value is refused unseen where schema and value together mean seconds of work.
        """
        return not self._is_too_much_work(value) and self._engine.is_valid(value)

    def errors(self, value: Any) -> list[Violation]:
        """Why the value does not fit, at most 20 reasons; empty when it fits.

        Where the engine's own list would cost too much (a large value, a recursive schema), the
        search goes down to the parts that do not fit and says less about each.
        """
        if self._is_too_much_work(value):
            return [Violation("", "is too large for a schema of this size", "schema")]
        return list(islice(_reasons(self, self.schema, self.schema, value, ""), VIOLATIONS_MAX))

    def _is_too_much_work(self, value: Any) -> bool:
        cost = self.shape.cost
        return cost > _COST_LIGHT and cost * _extent(value).count > CHECK_WORK_MAX


def compile_schema(schema: Any, pointer: str = "/schema") -> Validator:
    """Compile a schema, or take it from the cache; `pointer` is where it stands in the request.

    Raises `ContractError`, its fault is SCHEMA_INVALID, SCHEMA_REF_REFUSED or SCHEMA_TOO_LARGE.
    """
    return _compile(schema, pointer, slack=1)


def compile_derived(schema: Schema) -> Validator:
    """Compile a schema that was made of schemas which have compiled: facets, or a part of one.

    Its parts kept the limits; the whole may be larger.
    """
    return _compile(schema, "", slack=_SLACK)


def _compile(schema: Any, pointer: str, slack: int) -> Validator:
    if not isinstance(schema, dict | bool):
        raise _refused("SCHEMA_INVALID", "a schema is an object, true or false", pointer)
    try:
        canonical = _canonical(schema)
    except TypeError:
        raise _not_json(schema, pointer) from None
    if len(canonical) > SCHEMA_BYTES_MAX * slack:
        raise _refused("SCHEMA_TOO_LARGE", f"over {SCHEMA_BYTES_MAX} bytes", pointer)
    key = (hashlib.sha256(canonical).digest(), slack)
    found = _cache.get(key)
    if found is None:
        found = _compiled(schema, pointer, slack)
        _cache.put(key, found, len(canonical) + found.shape.patterns * _PATTERN_WEIGHT)
    return found


def canonical_sha256(schema: Schema) -> str:
    """The hex hash of a schema, equal whatever the order of its keys."""
    return hashlib.sha256(_canonical(schema)).hexdigest()


def _canonical(schema: Any) -> bytes:
    return orjson.dumps(schema, option=orjson.OPT_SORT_KEYS)


def _not_json(schema: Any, pointer: str) -> ContractError:
    """Why a value that can not be written as JSON is no schema."""
    try:
        check_value(schema)
    except JsonRefused as refused:
        code = "SCHEMA_TOO_LARGE" if refused.code == "JSON_TOO_DEEP" else "SCHEMA_INVALID"
        return _refused(code, refused.detail, pointer + refused.pointer)
    return _refused("SCHEMA_INVALID", "this is not JSON", pointer)  # pragma: no cover


def _compiled(schema: Schema, pointer: str, slack: int) -> Validator:
    try:
        # A derived schema stands a few levels deeper than the one that was checked.
        check_value(schema, limits=DEFAULT_LIMITS if slack == 1 else _DERIVED_LIMITS)
    except JsonRefused:
        raise _not_json(schema, pointer) from None
    shape = measure(schema, pointer, slack)
    try:
        engine = jsonschema_rs.Draft202012Validator(
            schema,
            retriever=_refuse_to_retrieve,
            pattern_options=jsonschema_rs.RegexOptions(
                size_limit=PATTERN_BYTES_MAX, dfa_size_limit=PATTERN_BYTES_MAX
            ),
            mask="the value",
        )
    except jsonschema_rs.ValidationError as error:
        raise _not_a_schema(error, pointer) from None
    return Validator(schema, shape, engine)


def _refuse_to_retrieve(uri: str) -> Never:
    # The second net: `measure` lets no reference pass that leads out of the document.
    raise ValueError("references out of the schema are refused")


def _not_a_schema(error: jsonschema_rs.ValidationError, pointer: str) -> ContractError:
    place = pointer + _pointer_of(error.instance_path)
    if isinstance(error.kind, jsonschema_rs.ValidationErrorKind.Referencing):
        return _refused("SCHEMA_REF_REFUSED", "a reference can not be resolved", place)
    if isinstance(error.kind, jsonschema_rs.ValidationErrorKind.Format):
        message = "no regular expression of linear time (no look-around, no back-reference)"
        return _refused("SCHEMA_INVALID", message + ", or too large", place)
    return _refused("SCHEMA_INVALID", _cut(error.message), place)


def _refused(code: str, message: str, pointer: str) -> ContractError:
    return ContractError(message, faults=[Fault(code, message, pointer)])


def _reasons(
    validator: Validator, root: Schema, schema: Schema, value: Any, at: str
) -> Iterator[Violation]:
    """Why a value does not fit; `validator` is that of `schema`, whose references go to `root`."""
    if validator._engine.is_valid(value):
        return
    if _detail_is_cheap(validator.shape, value):
        yield from (_violation(error, at) for error in validator._engine.iter_errors(value))
        return
    found = False
    # All items of an array have one schema; even finding it in the cache costs a hash.
    known: dict[int, Validator] = {}
    for step, part, below in _parts(follow(root, schema), value):
        derived = known.get(id(below))
        if derived is None:
            derived = known[id(below)] = compile_derived(standing_alone(below, root))
        for reason in _reasons(derived, root, below, part, f"{at}/{step}"):
            found = True
            yield reason
    if not found:
        yield Violation(at, "does not fit its schema; it is too large to say why", "schema")


def _detail_is_cheap(shape: Shape, value: Any) -> bool:
    extent = _extent(value)
    # Every level of a recursive value can multiply the errors by the loops of the schema.
    spread = (1 + shape.loops) ** extent.depth if shape.loops else 1
    errors = extent.count * shape.cost * spread
    return errors <= DETAIL_ERRORS_MAX and errors * extent.weight <= DETAIL_WORK_MAX


def _parts(schema: Schema, value: Any) -> Iterator[tuple[str, Any, Schema]]:
    """The parts of a value for which a schema names one sub-schema each, with that sub-schema."""
    if not isinstance(schema, dict):
        return
    if isinstance(value, dict):
        for key, below in schema.get("properties", {}).items():
            if key in value:
                yield escape(key), value[key], below
    elif isinstance(value, list) and "items" in schema:
        first = len(schema.get("prefixItems", ()))
        for index, item in enumerate(value[first:], first):
            yield str(index), item, schema["items"]


@dataclass(frozen=True, slots=True)
class _Extent:
    """`count`: the values in a JSON value, itself included; `weight`: what copying it costs."""

    count: int
    weight: int
    depth: int


def _extent(value: Any) -> _Extent:
    count = weight = depth = 0
    level = [value]
    while level:
        count += len(level)
        below: list[Any] = []
        for found in level:
            if type(found) is dict:
                below.extend(found.values())
                weight += sum(map(len, found)) // _CHARS_PER_WEIGHT
            elif type(found) is list:
                below.extend(found)
            elif type(found) is str:
                weight += len(found) // _CHARS_PER_WEIGHT
        depth += 1
        level = below
    return _Extent(count, count + weight, depth)


def _violation(error: jsonschema_rs.ValidationError, at: str) -> Violation:
    path = list(error.instance_path)
    message, keyword = error.message, error.kind.name
    if isinstance(error.kind, jsonschema_rs.ValidationErrorKind.Required):
        path.append(error.kind.property)
        message = "is required"
    elif isinstance(error.kind, jsonschema_rs.ValidationErrorKind.FalseSchema):
        # `additionalProperties: false` with nothing declared is reported as a bare `false`.
        message, last = "nothing is allowed here", error.schema_path[-1:]
        keyword = str(last[0]) if last and last[0] in SCHEMA_KEYWORDS else keyword
    return Violation(_cut(at + _pointer_of(path), POINTER_CHARS_MAX), _cut(message), keyword)


def _pointer_of(path: list[str | int]) -> str:
    return "".join(f"/{escape(str(step))}" for step in path)


def _cut(text: str, chars_max: int = MESSAGE_CHARS_MAX) -> str:
    # Half an escape at the end would make a pointer malformed.
    return text if len(text) <= chars_max else text[: chars_max - 1].rstrip("~") + "…"


class _Cache:
    """Compiled schemas by hash, bounded by their weight in bytes.

    Two generations: when the young one weighs half the bound it becomes the old one, and what was
    old and not asked for since is dropped. Large envelopes are checked in threads; this needs no
    lock, because the worst that a race does is to forget a schema.
    """

    def __init__(self, weight_max: int) -> None:
        self._weight_max = weight_max
        self._weight = 0
        self._young: dict[tuple[bytes, int], tuple[Validator, int]] = {}
        self._old: dict[tuple[bytes, int], tuple[Validator, int]] = {}

    def get(self, key: tuple[bytes, int]) -> Validator | None:
        found = self._young.get(key)
        if found is None:
            found = self._old.get(key)
            if found is None:
                return None
            self.put(key, *found)
        return found[0]

    def put(self, key: tuple[bytes, int], validator: Validator, weight: int) -> None:
        self._young[key] = (validator, weight)
        self._weight += weight
        if self._weight > self._weight_max // 2:
            self._old, self._young, self._weight = self._young, {}, 0


_cache = _Cache(CACHE_WEIGHT_MAX)
