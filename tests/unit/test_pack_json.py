"""`util.echo` and `json.query`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.adapters.capabilities.builtin import BuiltinAdapter
from app.adapters.capabilities.pack_json import JSON_PACK, run_query
from app.ports import CallFailed
from tests.capability_samples import call_of, compiled, run_builtin

# What the strict JSON gate lets through.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(TEXT, JSON, max_size=4))
def test_echo_gives_back_what_it_got(value: dict[str, Any]) -> None:
    echo = next(one for one in JSON_PACK.registrations() if one.capability_id == "util.echo")
    capability = compiled(echo, JSON_PACK.facets())
    function = BuiltinAdapter([JSON_PACK]).inline(capability)
    assert function is not None
    assert function(call_of(capability, value)) == value
    assert capability.input.is_trivial
    assert capability.output.is_trivial


@pytest.mark.parametrize(
    ("query", "value", "result"),
    [
        ("a.b[0]", {"a": {"b": [7]}}, 7),
        ("nodes[?status=='done'].id", {"nodes": [{"id": 1, "status": "done"}, {"id": 2}]}, [1]),
        ("{n: length(@), first: [0]}", [3, 4], {"n": 2, "first": 3}),
        ("missing", {}, None),
        ("@", "text", "text"),
    ],
)
async def test_query_selects(query: str, value: Any, result: Any) -> None:
    inputs = {"query": query, "json_value": value}
    assert await run_builtin(JSON_PACK, "json.query", inputs) == {"json_result": result}


@pytest.mark.parametrize("query", ["a[", "length(a)", "nope(@)", "to_number('NaN')", "((((", "`"])
def test_a_wrong_query_is_a_failure_for_people(query: str) -> None:
    with pytest.raises(CallFailed) as caught:
        run_query(query, {"a": 1})
    assert caught.value.code == "query_invalid"
    assert not caught.value.retryable


@pytest.mark.parametrize(
    "query",
    [
        "|".join(["[@,@]"] * 150),
        "|".join(["[@,@][]"] * 120),
        "|".join(["{a:@,b:@}"] * 90),
        "|".join(["[@,@].to_string(@)"] * 40),
        "|".join(["join('',[@,@])"] * 60),
        "[" * 990,
        "(" * 495 + "@" + ")" * 495,
        "!" * 900 + "@",
    ],
)
def test_a_query_that_swells_is_stopped_early(query: str) -> None:
    with pytest.raises(CallFailed) as caught:
        run_query(query, "x" * 100)
    assert caught.value.code in ("query_too_large", "query_invalid")


@pytest.mark.usefixtures("untraced")
def test_the_work_on_a_large_value_is_bounded() -> None:
    with pytest.raises(CallFailed, match="steps"):
        run_query("[?" + "||".join(["a.b.c"] * 100) + "]", [{"a": {}}] * 20_000)


@given(JSON)
def test_a_result_is_json(value: Any) -> None:
    assert run_query("@", value) == value
    json.dumps(run_query("[@, type(@)]", value), allow_nan=False)
