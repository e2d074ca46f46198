"""The JSON gate: every trap is refused with its reason, everything sane passes unchanged."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.kit.json_gate import INT_MAX, JsonLimits, JsonRefused, check_value, parse_json

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
SANE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-INT_MAX, INT_MAX)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)

TRAPS = [
    (b"", "JSON_EMPTY"),
    (b" \r\n\t", "JSON_EMPTY"),
    (b"\xef\xbb\xbf{}", "JSON_BOM"),
    (b'"\xff"', "JSON_NOT_UTF8"),
    (b'"\xed\xa0\x80"', "JSON_NOT_UTF8"),
    (b"{}{}", "JSON_SYNTAX"),
    (b"{} x", "JSON_SYNTAX"),
    (b"{'a': 1}", "JSON_SYNTAX"),
    (b'{"a": 1,}', "JSON_SYNTAX"),
    (b"[1", "JSON_SYNTAX"),
    (b"01", "JSON_SYNTAX"),
    (b"+1", "JSON_SYNTAX"),
    (b'"a\nb"', "JSON_SYNTAX"),
    (b'"a\0b"', "JSON_SYNTAX"),
    (b"// no\n1", "JSON_SYNTAX"),
    (b"NaN", "JSON_NOT_FINITE"),
    (b"[-Infinity]", "JSON_NOT_FINITE"),
    (b"Infinity", "JSON_NOT_FINITE"),
    (b"1e400", "JSON_NOT_FINITE"),
    (b"[-1E+400]", "JSON_NOT_FINITE"),
    (b"1" * 400 + b".0", "JSON_NOT_FINITE"),
    (b"9007199254740993", "JSON_INTEGER_TOO_LARGE"),
    (b'{"a": -9007199254740993}', "JSON_INTEGER_TOO_LARGE"),
    (b"1" * 31, "JSON_INTEGER_TOO_LARGE"),
    (b"1" * 20_000, "JSON_INTEGER_TOO_LARGE"),
    (b'{"a":1,"a":2}', "JSON_DUPLICATE_KEY"),
    (b'{"a" :1, "a"\n: 1}', "JSON_DUPLICATE_KEY"),
    (b'{"a":{"b":1},"a":2}', "JSON_DUPLICATE_KEY"),
    (b'[{"x": {"\\u0061":1,"a":2}}]', "JSON_DUPLICATE_KEY"),
    (b'{"":1,"":2,"c":"\\":"}', "JSON_DUPLICATE_KEY"),
    (b'"\\u0000"', "JSON_NUL"),
    (b'{"\\u0000": 1}', "JSON_NUL"),
    (b'{"k": ["a\\u0000"]}', "JSON_NUL"),
    (b'"\\ud800"', "JSON_SURROGATE"),
    (b'"\\udc00\\ud800"', "JSON_SURROGATE"),
    (b'{"\\uD800": 1}', "JSON_SURROGATE"),
    (b"[" * 65 + b"]" * 65, "JSON_TOO_DEEP"),
    (b'{"a":' * 65 + b"1" + b"}" * 65, "JSON_TOO_DEEP"),
    (b"[" * 1_000 + b"]" * 1_000, "JSON_TOO_DEEP"),
    (b"[" * 5_000 + b"]" * 5_000, "JSON_TOO_DEEP"),
    (b"[" * 1_000_000, "JSON_TOO_DEEP"),
]


@pytest.mark.parametrize(("body", "code"), TRAPS, ids=lambda value: repr(value)[:40])
def test_a_trap_is_refused_with_its_reason(body: bytes, code: str) -> None:
    with pytest.raises(JsonRefused) as caught:
        parse_json(body)
    assert caught.value.code == code
    assert len(caught.value.detail) < 200


def test_the_reason_names_the_duplicate_key() -> None:
    with pytest.raises(JsonRefused, match=r"the key 'budget' is there twice"):
        parse_json(b'{"a":1,"budget":1,"b":2,"budget":2}')


def test_the_reason_names_the_place() -> None:
    with pytest.raises(JsonRefused) as caught:
        parse_json(b'{"a/b": [1, {"c": "\\u0000"}]}')
    assert caught.value.pointer == "/a~1b/1/c"
    with pytest.raises(JsonRefused) as caught:
        parse_json(b'{"a": nope}')
    assert caught.value.position == 6
    with pytest.raises(JsonRefused) as caught:
        parse_json(b'"\xff"')
    assert caught.value.position == 1


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"9007199254740992", INT_MAX),
        (b"-9007199254740992", -INT_MAX),
        (b"[1.5e300, 1e5, 1E-400]", [1.5e300, 1e5, 0.0]),
        (b'"1234567890123456789"', "1234567890123456789"),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'{"a": ":", "b": "\\":"}', {"a": ":", "b": '":'}),
        (b'{"a": {"a": 1}, "b": {"a": 1}}', {"a": {"a": 1}, "b": {"a": 1}}),
        (b"[" * 64 + b"]" * 64, None),
        (b"[" + b",".join([b"{}"] * 200) + b"]", [{}] * 200),
        (b' "x" ', "x"),
        (b"-0", 0),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_looks_like_a_trap_but_is_none_passes(body: bytes, value: Any) -> None:
    parsed = parse_json(body)
    if value is not None:
        assert parsed == value


@given(SANE)
def test_sane_values_pass_unchanged(value: Any) -> None:
    assert parse_json(orjson.dumps(value)) == value
    check_value(value)


@given(st.binary() | st.text(alphabet='{}[]",:\\u0123456789abdeE.-+ ', max_size=60).map(str.encode))
@example(b'{"a":1,"\\u0061":2}')
def test_nothing_but_a_refusal_comes_out(body: bytes) -> None:
    try:
        value = parse_json(body)
    except JsonRefused:
        return
    check_value(value)
    assert parse_json(orjson.dumps(value)) == value


@pytest.mark.parametrize("value", [None, True, 1, 1.5, "plain", "\xe9", [], {}, {"\xe9": "\xe9"}])
def test_every_kind_of_json_value_passes(value: Any) -> None:
    check_value(value)
    assert parse_json(orjson.dumps(value)) == value


class Word(StrEnum):
    HELLO = "hello"


class OwnDict(dict[str, Any]):
    pass


@pytest.mark.parametrize(
    ("value", "code", "pointer"),
    [
        ({"a": [math.nan]}, "JSON_NOT_FINITE", "/a/0"),
        (math.inf, "JSON_NOT_FINITE", ""),
        ({"n": 2**53 + 1}, "JSON_INTEGER_TOO_LARGE", "/n"),
        ([-(2**53) - 1], "JSON_INTEGER_TOO_LARGE", "/0"),
        (["é\0"], "JSON_NUL", "/0"),
        (["\0"], "JSON_NUL", "/0"),
        ({"\0": 1}, "JSON_NUL", ""),
        ("\ud800", "JSON_SURROGATE", ""),
        ({"\ud800": 1}, "JSON_SURROGATE", ""),
        ({1: 1}, "JSON_NOT_JSON", ""),
        ({"a": (1, 2)}, "JSON_NOT_JSON", "/a"),
        ([{1}], "JSON_NOT_JSON", "/0"),
        (b"x", "JSON_NOT_JSON", ""),
        pytest.param(object(), "JSON_NOT_JSON", "", id="object"),
        (Word.HELLO, "JSON_NOT_JSON", ""),
        (OwnDict(), "JSON_NOT_JSON", ""),
    ],
    ids=repr,
)
def test_a_value_that_is_not_strict_json_is_refused(value: Any, code: str, pointer: str) -> None:
    with pytest.raises(JsonRefused) as caught:
        check_value(value)
    assert (caught.value.code, caught.value.pointer) == (code, pointer)


def nested(depth: int, *, as_dict: bool = False) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if as_dict else [value]
    return value


@pytest.mark.parametrize("as_dict", [False, True])
def test_the_depth_of_a_value_is_bounded(as_dict: bool) -> None:
    check_value(nested(64, as_dict=as_dict))
    with pytest.raises(JsonRefused, match="deeper"):
        check_value(nested(65, as_dict=as_dict))
    check_value(nested(3, as_dict=as_dict), limits=JsonLimits(depth_max=3))
    with pytest.raises(JsonRefused, match="deeper"):
        check_value(nested(5_000, as_dict=as_dict), limits=JsonLimits(depth_max=100_000))


def test_a_value_that_contains_itself_is_too_deep() -> None:
    value: dict[str, Any] = {}
    value["self"] = [value]
    with pytest.raises(JsonRefused) as caught:
        check_value(value)
    assert caught.value.code == "JSON_TOO_DEEP"
