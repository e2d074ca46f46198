"""The pure parts of the providers of models: cutting streams, judging schemas, reading headers."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from app.adapters.providers import Endpoint
from app.adapters.providers.anthropic_answers import MessageStream
from app.adapters.providers.exchange import AnswerStream
from app.adapters.providers.failures import error_word
from app.adapters.providers.framing import EventStream, Framing, JsonLines
from app.adapters.providers.ollama import OllamaStream
from app.adapters.providers.openai import limit_name
from app.adapters.providers.openai_chat import ChatStream
from app.adapters.providers.openai_responses import ResponseStream
from app.adapters.providers.wire import is_strict_schema, usage_of
from app.domain.chat import ChatAnswer, StopReason, ToolCall, Usage
from app.kit.retry_after import retry_after_s
from tests.model_wires import STREAMS

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)

# --- framing --------------------------------------------------------------------------------------

CUTS = st.lists(st.integers(0, 400), max_size=12)
PAYLOADS = st.lists(
    st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3).map(orjson.dumps),
    max_size=8,
)
ENDS = st.sampled_from([b"\n", b"\r\n"])


def pieces_of(body: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    return [body[start:end] for start, end in pairwise(places)]


def payloads_in(framing: Framing, body: bytes, cuts: list[int]) -> list[bytes]:
    found = [payload for piece in pieces_of(body, cuts) for payload in framing.feed(piece)]
    return found + framing.end()


@given(PAYLOADS, ENDS, CUTS, st.booleans())
def test_lines_are_the_same_in_all_pieces(
    payloads: list[bytes], end: bytes, cuts: list[int], is_ended: bool
) -> None:
    body = b"".join(payload + end + end for payload in payloads)
    body = body if is_ended else body.rstrip()
    assert payloads_in(JsonLines(), body, cuts) == payloads


@given(PAYLOADS, ENDS, CUTS, st.booleans())
def test_events_are_the_same_in_all_pieces(
    payloads: list[bytes], end: bytes, cuts: list[int], is_ended: bool
) -> None:
    body = b": hello" + end + end
    for number, payload in enumerate(payloads):
        lines = [b"event: message", b"id: 1", b"data:" + b" " * (number % 2) + payload]
        body += end.join(lines) + end + end
    body = body if is_ended else body.rstrip()
    assert payloads_in(EventStream(), body, cuts) == payloads


def test_an_event_may_have_many_lines_of_data() -> None:
    body = b"data: [1,\ndata:2]\n\ndata\n\nretry: 5\n\n\n"
    assert payloads_in(EventStream(), body, []) == [b"[1,\n2]", b""]


# --- streams --------------------------------------------------------------------------------------

ARGUMENTS = st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3).map(
    lambda found: orjson.dumps(found).decode()
)
CALLS = st.lists(st.builds(ToolCall, st.just("x"), st.text("ab_", min_size=1), ARGUMENTS)).map(
    lambda calls: tuple(
        ToolCall(f"call_{number}", call.name, call.arguments) for number, call in enumerate(calls)
    )
)


@st.composite
def said(draw: st.DrawFn) -> ChatAnswer:
    calls = draw(CALLS)
    stop = StopReason.TOOLS if calls else draw(st.sampled_from([StopReason.END, StopReason.LENGTH]))
    count = st.integers(0, 10_000)
    usage = draw(st.none() | st.builds(Usage, count, count))
    return ChatAnswer(draw(st.text()), stop, usage, calls)


@pytest.mark.parametrize("path", STREAMS)
@given(said(), CUTS)
def test_streamed_answers_are_the_same_in_all_pieces(
    path: str, answer: ChatAnswer, cuts: list[int]
) -> None:
    told: list[str] = []
    streams: dict[str, AnswerStream] = {
        "/v1/chat/completions": ChatStream(told.append),
        "/v1/responses": ResponseStream(told.append),
        "/v1/messages": MessageStream(told.append, None),
        "/api/chat": OllamaStream(told.append),
    }
    stream = streams[path]
    request = {"stream_options": {"include_usage": True}}
    body = b"".join(STREAMS[path](answer, request))
    framing = JsonLines() if path == "/api/chat" else EventStream()
    marks = [stream.take(payload) for payload in payloads_in(framing, body, cuts)]
    assert marks == [False] * (len(marks) - 1) + [True]
    assert stream.answer() == answer
    assert "".join(told) == answer.text


# --- schemas --------------------------------------------------------------------------------------

LEAF = st.sampled_from(
    [
        {"type": "string"},
        {"type": ["integer", "null"], "description": "how many"},
        {"type": "string", "enum": ["a", "b"]},
        {"anyOf": [{"type": "null"}, {"type": "boolean", "const": True}], "title": "Maybe"},
    ]
)


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def grown(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = inner.map(lambda items: {"type": "array", "items": items})
    return arrays | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3).map(closed)


STRICT = st.dictionaries(st.text("abc", min_size=1), st.recursive(LEAF, grown), max_size=3)
OPEN = st.sampled_from(
    [
        {},
        {"type": "array"},
        {"type": "object"},
        {"type": "object", "properties": {}, "additionalProperties": True},
        {"type": "object", "properties": {"a": LEAF}, "additionalProperties": False},
        {"type": ["object", "null"]},
        {"type": "string", "minLength": 1},
        {"type": "integer", "minimum": 0},
        {"$ref": "#/$defs/a"},
        {"enum": [1]},
        {"type": "object", **closed({}), "const": {}},
        {"anyOf": [{"type": "string", "pattern": "a"}]},
    ]
)


@given(STRICT)
def test_closed_schemas_of_few_keywords_are_strict(properties: dict[str, Any]) -> None:
    assert is_strict_schema(closed(properties))


@given(STRICT, OPEN)
def test_one_open_part_opens_the_whole(properties: dict[str, Any], part: dict[str, Any]) -> None:
    assert not is_strict_schema(closed({**properties, "part": part}))
    assert not is_strict_schema(closed({**properties, "part": {"type": "array", "items": part}}))
    assert not is_strict_schema(part)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"anyOf": [closed({})]},
        {**closed({}), "anyOf": [closed({})]},
        {**closed({"a": {"type": "string"}}), "required": []},
        {**closed({}), "$defs": {}},
    ],
)
def test_a_strict_schema_is_a_closed_object(schema: dict[str, Any]) -> None:
    assert not is_strict_schema(schema)


# --- small readers --------------------------------------------------------------------------------


@given(st.text())
def test_retry_after_is_read_or_not_and_never_fails(value: str) -> None:
    seconds = retry_after_s(value, NOW)
    assert seconds is None or 0 <= seconds <= 86_400


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("Wed, 25 Nov 2026 12:01:40 GMT", 100),
        ("Wed, 25 Nov 2026 12:01:40 -0000", 100),
        ("Wednesday, 25-Nov-26 12:01:40 GMT", 100),
        ("Mon, 01 Jan 2024 00:00:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400),
        ("Wed, 25 Nov 2026 12:01:40 +9999", None),
        ("Wed, 31 Feb 2026 12:01:40 GMT", None),
        ("123456789012", None),
        ("", None),
    ],
)
def test_retry_after_by_examples(value: str, seconds: float | None) -> None:
    assert retry_after_s(value, NOW) == seconds


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
)


@given(JSON, JSON)
def test_only_short_names_are_taken_for_a_word(code: Any, kind: Any) -> None:
    word = error_word({"code": code, "type": kind})
    assert word in ("", code, kind)
    assert word == "" or set(word) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-")
    assert error_word(code) == ""


@given(JSON, JSON, JSON)
def test_usage_is_true_or_none(tokens_in: Any, tokens_out: Any, cached: Any) -> None:
    usage = usage_of(tokens_in, tokens_out, cached)
    if usage is not None:
        assert (usage.tokens_in, usage.tokens_out) == (tokens_in, tokens_out)
        assert usage.tokens_cached == (cached or 0)
        assert 0 <= usage.tokens_cached <= usage.tokens_in
        assert not isinstance(tokens_in, bool)


def test_the_limit_has_another_name_at_openai() -> None:
    assert limit_name("https://api.openai.com/v1") == "max_completion_tokens"
    assert limit_name("https://api.openai.com.example/v1") == "max_tokens"
    assert limit_name("http://127.0.0.1:8000/v1") == "max_tokens"


# --- endpoints ------------------------------------------------------------------------------------

SECRET = "Secret-of-the-endpoint"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:11434",
        "ftp://host/v1",
        "http://",
        "http:///v1",
        "https://host:port",
        f"https://{SECRET}@host/v1",
        f"https://user:{SECRET}@host/v1",
        f"https://host/v1?key={SECRET}",
        f"https://host/v1#{SECRET}",
        "https://host\n/v1",
    ],
)
def test_addresses_that_can_not_be_used(url: str) -> None:
    with pytest.raises(ValueError, match="the base_url of provider 'models'") as caught:
        Endpoint("models", "openai", url)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"key": SecretStr("")}, "the key of"),
        ({"key": SecretStr(f"{SECRET}\n")}, "the key of"),
        ({"key": SecretStr(f"{SECRET} é")}, "the key of"),
        ({"project": f"{SECRET} "}, "the project of"),
        ({"headers": {"X-Key": f"{SECRET}\r\nHost: other"}}, "a header"),
        ({"headers": {f"{SECRET} :": "1"}}, "a header"),
    ],
)
def test_what_http_can_not_carry_is_refused_without_its_value(
    fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        Endpoint("models", "openai", "https://host/v1", **fields)
    assert "'models'" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_an_endpoint_shows_no_secret() -> None:
    headers = {"X-Key": SECRET}
    endpoint = Endpoint("models", "yandex", "https://host/v1", SecretStr(SECRET), headers)
    assert SECRET not in repr(endpoint)
    assert SECRET not in str(endpoint)
