"""What pydantic found wrong, as faults with JSON pointers. Never with a value of the input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from app.domain.errors import Fault
from app.kit.json_pointer import escape

FAULTS_MAX = 50
SEGMENT_CHARS_MAX = 120

Keys = tuple[int | str, ...]

_NOT_GIVEN: Any = object()


def faults_of_validation(
    error: ValidationError | RequestValidationError, prefix: str = "", *, value: Any = _NOT_GIVEN
) -> list[Fault]:
    """One fault a broken rule, at most 50; `code` is pydantic's type, such as "missing".

    `prefix` goes before each pointer. Pass the validated `value` as well: pydantic puts the names
    of union members among the keys, and only the value tells which is which.
    """
    found: dict[tuple[str, str], Fault] = {}
    for detail in error.errors():
        kind = detail["type"]
        segments = _segments(detail, value)
        pointer = prefix + "".join(f"/{escape(_short(segment))}" for segment in segments)
        found.setdefault((kind, pointer), Fault(kind, _message(detail), pointer))
        if len(found) == FAULTS_MAX:
            break
    return list(found.values())


def _message(detail: Any) -> str:
    # The one message of pydantic that repeats what was sent.
    if detail["type"] == "union_tag_invalid":
        return f"Input should be one of {detail['ctx']['expected_tags']}"
    return str(detail["msg"])


def _segments(detail: Any, value: Any) -> Keys:
    loc: Keys = detail["loc"]
    if value is _NOT_GIVEN:
        return tuple(segment for segment in loc if not _is_made_up(segment))
    is_missing = detail["type"] == "missing"
    keys = loc[:-1] if is_missing else loc
    # The right reading is the one that ends at the very object that pydantic complains about.
    ends = (way for way, end in _ways(value, keys) if end is detail["input"])
    found = next(ends, None) or _greedy(value, keys)
    return (*found, loc[-1]) if is_missing else found


def _ways(value: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    """All readings of a location in which some segments name union members, not keys."""
    if not keys:
        yield (), value
        return
    if _has(value, keys[0]):
        for way, end in _ways(value[keys[0]], keys[1:]):
            yield (keys[0], *way), end
    yield from _ways(value, keys[1:])


def _greedy(value: Any, keys: Keys) -> Keys:
    found: list[int | str] = []
    for key in keys:
        if _has(value, key):
            found.append(key)
            value = value[key]
    return tuple(found)


def _has(value: Any, key: int | str) -> bool:
    if isinstance(value, dict):
        return key in value
    return isinstance(value, list) and isinstance(key, int) and 0 <= key < len(value)


def _is_made_up(segment: int | str) -> bool:
    """Validators and `[key]` in a location, which no JSON pointer could mean."""
    return isinstance(segment, str) and segment.endswith("]") and "[" in segment


def _short(segment: int | str) -> str:
    text = str(segment)
    return text if len(text) <= SEGMENT_CHARS_MAX else text[:SEGMENT_CHARS_MAX] + "…"
