"""JSON pointers (RFC 6901): naming a place in a JSON value. No pointer syntax is read elsewhere."""

from __future__ import annotations

import re
from typing import Any

_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
_BAD_ESCAPE = re.compile(r"~(?![01])")


class PointerMissing(KeyError):
    """The pointer is malformed, or the value has nothing there. `pointer` is the whole pointer."""

    def __init__(self, pointer: str) -> None:
        super().__init__(pointer)
        self.pointer = pointer


def escape(token: str) -> str:
    """One key as a segment of a pointer, without the slash before it."""
    return token.replace("~", "~0").replace("/", "~1")


def tokens(pointer: str) -> list[str]:
    """The keys along a pointer, none for the empty one; raises `PointerMissing` if malformed."""
    if not pointer:
        return []
    if pointer[0] != "/" or _BAD_ESCAPE.search(pointer):
        raise PointerMissing(pointer)
    return [part.replace("~1", "/").replace("~0", "~") for part in pointer[1:].split("/")]


def is_index(token: str) -> bool:
    """Whether a segment can be an array index: decimal digits without leading zeros."""
    return _INDEX.fullmatch(token) is not None


def resolve(value: Any, pointer: str) -> Any:
    """The part of a JSON value that a pointer names; raises `PointerMissing`.

    "-", the place after the last element, never exists in a value that is read.
    """
    for token in tokens(pointer):
        if isinstance(value, dict) and token in value:
            value = value[token]
        elif isinstance(value, list) and is_index(token) and int(token) < len(value):
            value = value[int(token)]
        else:
            raise PointerMissing(pointer)
    return value
