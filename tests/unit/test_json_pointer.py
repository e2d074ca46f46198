"""RFC 6901, with the example of its section 5."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.kit.json_pointer import PointerMissing, escape, is_index, resolve, tokens

RFC_DOCUMENT: dict[str, Any] = {
    "foo": ["bar", "baz"],
    "": 0,
    "a/b": 1,
    "c%d": 2,
    "e^f": 3,
    "g|h": 4,
    "i\\j": 5,
    'k"l': 6,
    " ": 7,
    "m~n": 8,
}


@pytest.mark.parametrize(
    ("pointer", "value"),
    [
        ("", RFC_DOCUMENT),
        ("/foo", ["bar", "baz"]),
        ("/foo/0", "bar"),
        ("/", 0),
        ("/a~1b", 1),
        ("/c%d", 2),
        ("/e^f", 3),
        ("/g|h", 4),
        ("/i\\j", 5),
        ('/k"l', 6),
        ("/ ", 7),
        ("/m~0n", 8),
    ],
)
def test_the_examples_of_the_rfc(pointer: str, value: Any) -> None:
    assert resolve(RFC_DOCUMENT, pointer) == value


@pytest.mark.parametrize(
    "pointer",
    [
        "foo",
        "/foo/2",
        "/foo/-",
        "/foo/00",
        "/foo/01",
        "/foo/-1",
        "/foo/1e0",
        "/foo/+1",
        "/foo/\u0660",
        "/foo/99999999999999999999",
        "/nope",
        "/foo/0/x",
        "/m~n",
        "/m~2n",
        "/m~",
    ],
)
def test_what_is_not_there_is_missing(pointer: str) -> None:
    with pytest.raises(PointerMissing) as caught:
        resolve(RFC_DOCUMENT, pointer)
    assert caught.value.pointer == pointer


def test_tilde_one_is_read_before_tilde_zero() -> None:
    assert tokens("/~01") == ["~1"]


@given(st.lists(st.text()))
def test_escaping_is_undone_by_reading(keys: list[str]) -> None:
    assert tokens("".join("/" + escape(key) for key in keys)) == keys


@given(st.integers(min_value=0, max_value=999_999_999))
def test_decimal_numbers_are_indexes(number: int) -> None:
    assert is_index(str(number))
    assert not is_index(f"0{number}")
