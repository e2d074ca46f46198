"""Cursors: what was given out comes back, everything else is refused."""

from __future__ import annotations

import base64
import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.paging import decode_cursor, encode_cursor
from app.domain.errors import BadInput

KEY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)


@given(KEY, KEY)
def test_a_cursor_comes_back(first: str, second: str) -> None:
    cursor = encode_cursor((first, second))
    assert re.fullmatch(r"[A-Za-z0-9_-]+", cursor)
    assert decode_cursor(cursor, parts=2) == (first, second)


@given(st.text(max_size=100))
def test_nothing_but_bad_cursor_is_raised(cursor: str) -> None:
    with contextlib.suppress(BadInput):
        assert all(isinstance(part, str) for part in decode_cursor(cursor))


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b'"a"', b'["a","b"]', b"[1]", b'["a\\u0000"]', b'["\\ud800"]', b"\xff"],
)
def test_other_keys_are_refused(content: bytes) -> None:
    with pytest.raises(BadInput):
        decode_cursor(base64.urlsafe_b64encode(content).decode())
