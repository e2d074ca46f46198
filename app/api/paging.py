"""Cursor paging: `?limit=` and an opaque `?cursor=` that names the last key of the page before."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

import orjson
from fastapi import Query

from app.domain.errors import BadInput

LIMIT_DEFAULT = 50
LIMIT_MAX = 200
CURSOR_CHARS_MAX = 1_024

Limit = Annotated[
    int, Query(ge=1, le=LIMIT_MAX, description="How many entries a page has at most.")
]
Cursor = Annotated[str | None, Query(description="`next_cursor` of the page before.")]


def encode_cursor(key: tuple[str, ...]) -> str:
    """The key of the last entry shown, as base64url without padding."""
    return base64.urlsafe_b64encode(orjson.dumps(key)).rstrip(b"=").decode()


def decode_cursor(cursor: str, parts: int = 1) -> tuple[str, ...]:
    """The key, which has so many parts. Raises `BadInput` `bad_cursor`."""
    key = _read(cursor) if len(cursor) <= CURSOR_CHARS_MAX else None
    if (
        not isinstance(key, list)
        or len(key) != parts
        or not all(isinstance(part, str) and "\0" not in part for part in key)
    ):
        raise BadInput("The cursor is not one that this list gave out.", code="bad_cursor")
    return tuple(key)


def _read(cursor: str) -> object:
    try:
        padded = cursor.encode() + b"=" * (-len(cursor) % 4)
        return orjson.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError):
        return None
