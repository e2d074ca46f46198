"""The strict gate for JSON from outside: request bodies and the outputs of capabilities.

What passes can be stored, streamed and read back by every JSON parser with the same meaning. The
parsers at hand each let something through: NaN, 1e400 (infinite), integers that lose digits, the
last of two equal keys, NUL (Postgres refuses it), half surrogate pairs, nesting that can be read
but not written. All of that stops here, with a reason and never with another exception.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn

import orjson

from app.kit.json_pointer import escape

INT_MAX = 2**53
"""The largest whole number that every JSON parser keeps exactly, both signs."""


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """`depth_max`: how many arrays and objects may stand in each other."""

    depth_max: int = 64


DEFAULT_LIMITS = JsonLimits()
_DEEPER = "the value is nested deeper than allowed"


class JsonRefused(ValueError):
    """A body or a value that is not strict JSON.

    `code` is one of JSON_EMPTY, JSON_NOT_UTF8, JSON_BOM, JSON_SYNTAX, JSON_NOT_FINITE,
    JSON_INTEGER_TOO_LARGE, JSON_DUPLICATE_KEY, JSON_NUL, JSON_SURROGATE, JSON_TOO_DEEP,
    JSON_NOT_JSON. `pointer` is the place in the value where it is known, else "". `position` is the
    byte or character of a syntax error, else None. No text of the body is in `detail`, but for the
    name of a duplicate key.
    """

    def __init__(
        self, code: str, detail: str, *, pointer: str = "", position: int | None = None
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.pointer = pointer
        self.position = position


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise JsonRefused("JSON_DUPLICATE_KEY", f"the key {twice[:80]!a} is there twice")
    return found


def _refuse_constant(_name: str) -> NoReturn:
    raise JsonRefused("JSON_NOT_FINITE", "NaN and Infinity are not JSON")


def _int_of(text: str) -> int:
    # 17 characters hold 2^53 with its sign; longer texts are never turned into a number.
    value = int(text) if len(text) <= 17 else INT_MAX + 1
    if abs(value) > INT_MAX:
        raise JsonRefused(
            "JSON_INTEGER_TOO_LARGE", "an integer is beyond 2^53; send it as a string"
        )
    return value


def _float_of(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonRefused("JSON_NOT_FINITE", "a number is too large to be kept")
    return value


# The decoder that judges. It calls back for every object and number, so it is the slow way.
_careful = json.JSONDecoder(
    object_pairs_hook=_object_of,
    parse_constant=_refuse_constant,
    parse_int=_int_of,
    parse_float=_float_of,
)


def parse_json(body: bytes, *, limits: JsonLimits = DEFAULT_LIMITS) -> Any:
    """The value of a JSON text in UTF-8; raises `JsonRefused` and nothing else.

    orjson reads the text; what it would let through (an integer over 15 digits, a duplicate key, an
    escaped NUL, deep nesting) leaves a trace that is cheap to look for. Only a body with such a
    trace, or one that orjson refuses, is judged by the careful decoder.
    """
    try:
        value = orjson.loads(body)
    except ValueError:
        return _judged(body, limits)
    keys, depth = _keys_and_depth(value)
    if depth > limits.depth_max:
        raise JsonRefused("JSON_TOO_DEEP", _DEEPER)
    return _judged(body, limits) if _may_hide_something(body, keys) else value


_DIGITS_ALIKE = bytes.maketrans(b"0123456789", b"0" * 10)
_NUL_OR_HALF_A_PAIR = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")


def _may_hide_something(body: bytes, keys: int) -> bool:
    """Whether the text may hold a long integer, a NUL, or more keys than the value has.

    Without white space every key is followed by `":`. Strings can hold that too, so the count may
    be too high, never too low: when it equals the keys of the value, no key was dropped.
    """
    if b"0" * 16 in body.translate(_DIGITS_ALIKE):
        return True
    if b"\\u" in body and _NUL_OR_HALF_A_PAIR.search(body):
        return True
    return body.translate(None, b" \t\r\n").count(b'":') != keys


def _keys_and_depth(value: Any) -> tuple[int, int]:
    """How many keys all objects of a value have together, and how deep it is nested."""
    keys = depth = 0
    level: list[Any] = [value] if type(value) is dict or type(value) is list else []
    while level:
        depth += 1
        below = []
        for found in level:
            if type(found) is dict:
                keys += len(found)
                found = found.values()
            for item in found:
                kind = type(item)
                if kind is dict or kind is list:
                    below.append(item)
        level = below
    return keys, depth


def _judged(body: bytes, limits: JsonLimits) -> Any:
    try:
        value = _careful.decode(body.decode())
    except JsonRefused:
        raise
    except RecursionError:
        raise JsonRefused("JSON_TOO_DEEP", _DEEPER) from None
    except ValueError as error:
        raise _unreadable(body, error) from None
    check_value(value, limits=limits)
    return value


def _unreadable(body: bytes, error: ValueError) -> JsonRefused:
    """Why a body could not be read, from the error of the codec or of the decoder."""
    if isinstance(error, UnicodeDecodeError):
        return JsonRefused("JSON_NOT_UTF8", "the text is not UTF-8", position=error.start)
    if not body.strip():
        return JsonRefused("JSON_EMPTY", "there is no JSON value")
    if body.startswith(b"\xef\xbb\xbf"):
        return JsonRefused("JSON_BOM", "the text starts with a byte order mark", position=0)
    # The decoder's message says what was expected and never quotes the text.
    at = getattr(error, "pos", None)
    return JsonRefused("JSON_SYNTAX", f"this is not JSON: {error}", position=at)


def check_value(value: Any, *, limits: JsonLimits = DEFAULT_LIMITS) -> None:
    """Hold an already built value to the same rules; raises `JsonRefused` with its pointer.

    Only dict with str keys, list, str, int, float, bool and None, each exactly (no subclasses). A
    value that contains itself is too deep.
    """
    try:
        _check(value, limits.depth_max)
    except RecursionError:
        # Only a limit far above the default lets this come first.
        raise JsonRefused("JSON_TOO_DEEP", _DEEPER) from None


def _check(value: Any, room: int) -> None:
    """`room` is how many levels may still be opened."""
    kind = type(value)
    if kind is str:
        if "\0" in value or not value.isascii():
            _check_text(value)
    elif kind is dict:
        _check_dict(value, room - 1)
    elif kind is list:
        _check_list(value, room - 1)
    elif kind is int:
        if not -INT_MAX <= value <= INT_MAX:
            raise JsonRefused("JSON_INTEGER_TOO_LARGE", "an integer is beyond 2^53")
    elif kind is float:
        if not math.isfinite(value):
            raise JsonRefused("JSON_NOT_FINITE", "NaN and Infinity are not JSON")
    elif value is not None and kind is not bool:
        raise JsonRefused("JSON_NOT_JSON", f"a {kind.__name__} is not a JSON value")


def _check_dict(value: dict[Any, Any], room: int) -> None:
    if room < 0:
        raise JsonRefused("JSON_TOO_DEEP", _DEEPER)
    for key, item in value.items():
        if type(key) is not str:
            raise JsonRefused("JSON_NOT_JSON", f"a key is a {type(key).__name__}, not a string")
        if "\0" in key or not key.isascii():
            _check_text(key)
        # Plain text is most of what passes: it is not worth a call.
        if type(item) is str and item.isascii() and "\0" not in item:
            continue
        try:
            _check(item, room)
        except JsonRefused as refused:
            refused.pointer = f"/{escape(key)}{refused.pointer}"
            raise


def _check_list(value: list[Any], room: int) -> None:
    if room < 0:
        raise JsonRefused("JSON_TOO_DEEP", _DEEPER)
    for index, item in enumerate(value):
        if type(item) is str and item.isascii() and "\0" not in item:
            continue
        try:
            _check(item, room)
        except JsonRefused as refused:
            refused.pointer = f"/{index}{refused.pointer}"
            raise


def _check_text(text: str) -> None:
    if "\0" in text:
        raise JsonRefused("JSON_NUL", "a string contains the character U+0000")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise JsonRefused("JSON_SURROGATE", "a string contains half a surrogate pair") from None
