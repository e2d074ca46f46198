"""What providers of models make of a server that fails, lies or stalls; and that nobody is told
the key, the prompt or the answer on that occasion."""

from __future__ import annotations

import asyncio
import logging
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import uvloop

from app.adapters.providers import Endpoint, make_provider
from app.domain.chat import ChatRole, LlmUnavailableError, Message
from app.ports import Provider
from tests.far_side import Behaviour, answer, raw
from tests.model_server import (
    ModelServer,
    endless,
    running_model_server,
    say_nothing,
    unfinished,
)
from tests.providers import PATHS, WIRES, Wire, asked

KEY = "sk-Canary-of-the-key"
PROMPT = "Canary of the prompt"
ANSWER = "Canary of the answer, which is long enough to be cut in the middle."
PLANTED = f'{{"error":{{"code":"{PROMPT}","type":"a_word","message":"{KEY} {PROMPT} {ANSWER}"}}}}'
SHORT_S = 0.2
STREAM_TYPES = {"ollama": "application/x-ndjson"}


@pytest.fixture(params=WIRES, ids="-".join)
def wire(request: pytest.FixtureRequest) -> Wire:
    found: Wire = request.param
    return found


@pytest.fixture
async def server() -> AsyncIterator[ModelServer]:
    async with running_model_server() as running:
        running.say(ANSWER)
        yield running


@pytest.fixture
async def provider(server: ModelServer, wire: Wire) -> AsyncIterator[Provider]:
    async with running_provider(server.endpoint(*wire, key=KEY)) as running:
        yield running


@asynccontextmanager
async def running_provider(endpoint: Endpoint) -> AsyncIterator[Provider]:
    provider = make_provider(endpoint)
    try:
        yield provider
    finally:
        await provider.aclose()


@pytest.fixture(autouse=True)
def nothing_is_told(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No log line of a test holds a canary.

    But for the tracing of httpcore, which quotes broken answers: DEBUG must not turn it on.
    """
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, "httpcore")
    yield
    lines = [logging.Formatter().format(record) for record in caplog.get_records("call")]
    assert not leaked("\n".join(lines))


def leaked(text: str) -> list[str]:
    return [canary for canary in (KEY, PROMPT, ANSWER, ANSWER[:20]) if canary in text]


async def failure(
    provider: Provider, *, is_streamed: bool = False, timeout_s: float = 10
) -> Exception:
    """How a call failed; whatever it says holds no canary."""
    request = replace(asked(Message(ChatRole.USER, PROMPT)), timeout_s=timeout_s)
    with pytest.raises((LlmUnavailableError, TimeoutError)) as caught:
        await provider.chat(request, (lambda _: None) if is_streamed else None)
    error = caught.value
    shown = "".join(traceback.format_exception(error))
    assert not leaked(f"{shown} {error!r} {vars(error)} {provider!r}")
    assert error.__cause__ is error.__context__ is None
    return error


def judged(error: BaseException) -> tuple[str, bool, bool, int | None]:
    """Code, retryable, counted by the breaker, status."""
    assert isinstance(error, LlmUnavailableError)
    return (error.code, error.retryable, error.target_failed, error.status)


UNREACHABLE = ("provider_unreachable", True, True, None)
GARBAGE = ("provider_garbage", True, False, None)

# --- statuses -------------------------------------------------------------------------------------

STATUSES = [
    *((status, "provider_refused", False) for status in (400, 401, 402, 403, 404, 409, 413, 422)),
    *((status, "provider_refused", False) for status in (301, 302, 304, 307, 308)),
    (429, "provider_busy", True),
    *((status, "provider_failed", True) for status in (408, 500, 502, 503, 504, 529)),
]


async def test_statuses(provider: Provider, server: ModelServer) -> None:
    for status, code, is_passing in STATUSES:
        for is_streamed in (False, True):
            body = b"" if status == 304 else PLANTED.encode()
            server.behave(answer(status, body, Location=f"{server.url}/elsewhere"))
            error = await failure(provider, is_streamed=is_streamed)
            assert judged(error) == (code, is_passing, is_passing, status)
            if status < 400:
                assert str(error) == f"models answered {status}: redirects are not followed"
            else:
                assert str(error) == f"models answered {status}: a_word"
    assert len(server.requests) == 2 * len(STATUSES)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b'{"error": {"code": "model_not_found", "type": "other"}}', ": model_not_found"),
        (b'{"type": "error", "error": {"type": "rate_limit_error"}}', ": rate_limit_error"),
        (b'{"error": {"code": 429, "type": "Too many"}}', ""),
        (b'{"error": "model \\"x\\" not found"}', ""),
        (b'{"error": {"code": "%s"}}' % (b"x" * 65), ""),
        (b"<html>", ""),
        (b"[1]", ""),
        (b"", ""),
        (b'{"error": {"code": "long_winded"}, "a": "%s"}' % (b"x" * 20_000), ""),
    ],
)
async def test_the_vendors_word_for_an_error(server: ModelServer, body: bytes, word: str) -> None:
    async with running_provider(server.endpoint("openai")) as provider:
        server.behave(answer(404, body, "text/plain"))
        assert str(await failure(provider)) == f"models answered 404{word}"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), (" 0 ", 0), ("999999999", 86_400), ("soon", None), ("-1", None), ("1.5", None)],
)
async def test_retry_after(
    provider: Provider, server: ModelServer, value: str, seconds: int
) -> None:
    for status in (429, 503):
        server.behave(answer(status, Retry_After=value))
        error = await failure(provider)
        assert isinstance(error, LlmUnavailableError)
        assert error.retry_after_s == seconds


async def test_retry_after_as_a_date(provider: Provider, server: ModelServer) -> None:
    at = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    server.behave(answer(429, Retry_After=at), answer(429, Retry_After=at[:-4] + " -0000"))
    for _ in range(2):
        error = await failure(provider)
        assert isinstance(error, LlmUnavailableError)
        assert error.retry_after_s is not None
        assert 50 < error.retry_after_s <= 100


# --- time -----------------------------------------------------------------------------------------


async def test_slow_answers(provider: Provider, server: ModelServer) -> None:
    """The first byte never comes, or the body stops halfway."""
    server.behave(say_nothing, say_nothing, server.break_down, server.break_down)
    kinds = (False, True, False, True)
    calls = (failure(provider, is_streamed=kind, timeout_s=SHORT_S) for kind in kinds)
    for error in await asyncio.gather(*calls):
        assert type(error) is TimeoutError
        assert str(error) == "models gave no whole answer in time"
    await server.side.gone.wait()


async def test_the_time_is_for_embeddings_and_models_too(
    provider: Provider, server: ModelServer, wire: Wire
) -> None:
    server.behave(say_nothing, say_nothing)
    calls: list[Awaitable[object]] = [provider.models(SHORT_S)]
    if wire[0] != "anthropic":
        calls.append(provider.embed("small-1", [PROMPT], SHORT_S))
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert type(outcome) is TimeoutError


async def test_no_time_at_all(provider: Provider) -> None:
    for timeout_s in (0, -1):
        assert type(await failure(provider, timeout_s=timeout_s)) is TimeoutError


async def test_an_error_whose_words_never_come(provider: Provider, server: ModelServer) -> None:
    server.behave(unfinished(429, PLANTED.encode()))
    error = await failure(provider, timeout_s=1.5)  # the status comes in time, ERROR_BODY_S is more
    assert judged(error) == ("provider_busy", True, True, 429)
    assert str(error) == "models answered 429"


async def test_an_end_mark_is_the_end(server: ModelServer) -> None:
    """A server that leaves its body open after it is not waited for."""
    async with running_provider(server.endpoint("openai")) as provider:
        body = b'data: {"choices":[{"delta":{"content":"Hi"},"finish_reason":"stop"}]}\n\n'
        server.behave(unfinished(200, body + b"data: [DONE]\n\n", "text/event-stream"))
        assert (await provider.chat(asked(), lambda _: None)).text == "Hi"


# --- connections ----------------------------------------------------------------------------------


async def test_nobody_listens(wire: Wire) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for base_url in (url, "http://nowhere.invalid", f"http://{'a' * 70}.invalid"):
            endpoint = Endpoint("models", wire[0], base_url, api=wire[1])
            async with running_provider(endpoint) as provider:
                error = await failure(provider)
                assert judged(error) == UNREACHABLE
                assert str(error) == "models: no connection could be made"


NO_HTTP = f"{ANSWER} {PROMPT} {KEY}\r\n\r\n".encode()
HALF = (
    b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"message":'
)
BREAKS = {
    "reset at once": raw(b"", reset=True),
    "closed at once": raw(b""),
    "reset in the body": raw(HALF, reset=True),
    "closed in the body": raw(HALF + ANSWER.encode()),
    "no HTTP": raw(NO_HTTP),
    "broken chunk": raw(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        + NO_HTTP
    ),
}


@pytest.mark.parametrize("behaviour", BREAKS.values(), ids=BREAKS)
async def test_broken_connections(
    provider: Provider, server: ModelServer, behaviour: Behaviour
) -> None:
    server.behave(behaviour)
    assert judged(await failure(provider)) == UNREACHABLE


def test_resets_on_the_event_loop_of_the_service() -> None:
    async def ask_often() -> list[object]:
        async with (
            running_model_server() as server,
            running_provider(server.endpoint("ollama")) as provider,
        ):
            server.behave(*[raw(b"", reset=True)] * 100)
            calls = (provider.chat(asked()) for _ in range(100))
            return await asyncio.gather(*calls, return_exceptions=True)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcomes = runner.run(ask_often())
    assert [judged(o) for o in outcomes if isinstance(o, BaseException)] == [UNREACHABLE] * 100


# --- answers that can not be read -----------------------------------------------------------------

BODIES = {
    "no JSON": f"{ANSWER} {PROMPT}",
    "nothing": "",
    "half a JSON": f'{{"a": "{ANSWER}',
    "no object": f'["{ANSWER}"]',
    "null": "null",
    "empty object": "{}",
    "no UTF-8": '{"a": "\udcff"}',
    "not a number": '{"a": NaN}',
    "other object": PLANTED,
    "wrong types": '{"choices": 1, "output": 1, "status": 1, "content": 1, "message": 1}',
    "empty lists": '{"choices": [], "output": [], "status": "x", "content": [], "done": false}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_garbage(provider: Provider, server: ModelServer, wire: Wire, body: str) -> None:
    data = body.encode(errors="surrogateescape")
    server.behave(answer(200, data))
    error = await failure(provider)
    if body == PLANTED and wire[0] == "ollama":
        # Its errors are like that, also after a good status.
        assert judged(error) == ("provider_failed", True, True, None)
    else:
        assert judged(error) == GARBAGE


async def test_garbage_for_embeddings_and_models(
    provider: Provider, server: ModelServer, wire: Wire
) -> None:
    one = '{"data": [{"index": 0, "embedding": [1]}], "embeddings": [[1]]}'
    twice = '{"data": [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [2]}]}'
    flat = '{"data": [{"index": 0, "embedding": 1}], "embeddings": [1, 2]}'
    words = '{"data": [{"index": 0, "embedding": ["1"]}], "embeddings": [["1"], ["2"]]}'
    empty = (
        '{"data": [{"index": 0, "embedding": []}, {"index": 1, "embedding": [1]}], '
        '"embeddings": [[], [1]]}'
    )
    for body in (*BODIES.values(), one, twice, flat, words, empty):
        data = body.encode(errors="surrogateescape")
        server.behave(answer(200, data))
        with pytest.raises(LlmUnavailableError) as caught:
            await provider.models(10)
        assert judged(caught.value) == GARBAGE
        if wire[0] != "anthropic":
            server.behave(answer(200, data))
            with pytest.raises(LlmUnavailableError) as caught:
                await provider.embed("small-1", [PROMPT, ANSWER], 10)
            assert judged(caught.value) == GARBAGE
        assert not leaked(str(caught.value))


async def test_media_types(provider: Provider, server: ModelServer, wire: Wire) -> None:
    streamed = STREAM_TYPES.get(wire[0], "text/event-stream")
    for is_streamed, wanted in ((False, "application/json"), (True, streamed)):
        for media_type in ("text/html", "image/png", "application/problem"):
            server.behave(answer(200, PLANTED.encode(), media_type))
            error = await failure(provider, is_streamed=is_streamed)
            assert judged(error) == GARBAGE
            assert str(error) == f"models: the answer is not {wanted}"
    server.behave(answer(200, b"\x1f\x8b", Content_Encoding="gzip"))
    assert judged(await failure(provider)) == GARBAGE


async def test_a_server_may_name_no_media_type(server: ModelServer) -> None:
    async with running_provider(server.endpoint("ollama")) as provider:
        body = b'{"message": {"content": "Hi"}, "done": true}'
        server.behave(answer(200, body, None), answer(200, body, None))
        for on_text in (None, lambda _: None):
            assert (await provider.chat(asked(), on_text)).text == "Hi"


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_huge_answer(
    provider: Provider, server: ModelServer, wire: Wire, is_streamed: bool
) -> None:
    media_type = STREAM_TYPES.get(wire[0], "text/event-stream")
    server.behave(endless(media_type if is_streamed else "application/json"))
    error = await failure(provider, is_streamed=is_streamed)
    assert judged(error) == GARBAGE
    assert str(error) == "models: the answer is larger than 8388608 bytes"
    await server.side.gone.wait()


# --- streams --------------------------------------------------------------------------------------


async def test_a_stream_without_its_end_mark(
    provider: Provider, server: ModelServer, wire: Wire
) -> None:
    media_type = STREAM_TYPES.get(wire[0], "text/event-stream")
    half = f'{{"type": "{ANSWER}' if wire[0] == "ollama" else f'data: {{"type": "{ANSWER}'
    bodies = (b"", b"\n", half.encode())
    server.behave(server.cut_off, *(answer(200, body, media_type) for body in bodies))
    for _ in range(4):
        error = await failure(provider, is_streamed=True)
        assert judged(error) == UNREACHABLE
        assert str(error) == "models: the connection broke off"


async def test_a_stream_that_is_reset(provider: Provider, server: ModelServer, wire: Wire) -> None:
    media_type = STREAM_TYPES.get(wire[0], "text/event-stream")
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: 900\r\n\r\n"
    server.behave(raw(head.encode() + b"\n\n", reset=True))
    assert judged(await failure(provider, is_streamed=True)) == UNREACHABLE


STREAMED_ERRORS: dict[str, Callable[[str], str]] = {
    "/v1/chat/completions": lambda word: f'data: {{"error": {{"code": "{word}"}}}}\n\n',
    "/v1/messages": lambda word: f'data: {{"type": "error", "error": {{"type": "{word}"}}}}\n\n',
    "/v1/responses": lambda word: f'data: {{"type": "error", "code": "{word}"}}\n\n',
    "/api/chat": lambda word: f'{{"error": "{word}"}}\n',
}


@pytest.mark.parametrize(
    ("word", "code"),
    [
        ("rate_limit_error", "provider_busy"),
        ("invalid_request_error", "provider_refused"),
        ("overloaded_error", "provider_failed"),
        (PROMPT, "provider_failed"),
    ],
)
async def test_an_error_in_the_stream(
    provider: Provider, server: ModelServer, wire: Wire, word: str, code: str
) -> None:
    media_type = STREAM_TYPES.get(wire[0], "text/event-stream")
    server.behave(answer(200, STREAMED_ERRORS[PATHS[wire]](word).encode(), media_type))
    error = await failure(provider, is_streamed=True)
    if wire[0] == "ollama":
        assert judged(error) == ("provider_failed", True, True, None)
        assert str(error) == "models: the answer is an error"
        return
    is_passing = code != "provider_refused"
    assert judged(error) == (code, is_passing, is_passing, None)
    shown = "" if word == PROMPT else f": {word}"
    assert str(error) == f"models: the answer is an error{shown}"


STREAM_GARBAGE = {
    "no JSON": f"data: {ANSWER}\n\n",
    "wrong types": 'data: {"choices": 1, "type": 1, "message": 1}\n\n',
}


@pytest.mark.parametrize("body", STREAM_GARBAGE.values(), ids=STREAM_GARBAGE)
async def test_garbage_in_the_stream(
    provider: Provider, server: ModelServer, wire: Wire, body: str
) -> None:
    is_lines = wire[0] == "ollama"
    data = (body.removeprefix("data: ") if is_lines else body).encode()
    server.behave(answer(200, data, STREAM_TYPES.get(wire[0], "text/event-stream")))
    assert judged(await failure(provider, is_streamed=True)) == GARBAGE


LIES = {
    "no reason to end": ("openai", "chat", "data: [DONE]\n\n"),
    "unknown reason": (
        *("openai", "chat"),
        'data: {"choices": [{"delta": {}, "finish_reason": "boredom"}]}\n\ndata: [DONE]\n\n',
    ),
    "calls without a call": (
        *("openai", "chat"),
        'data: {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}\n\ndata: [DONE]\n\n',
    ),
    "a call without a name": (
        *("openai", "chat"),
        'data: {"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "a"}]}, '
        '"finish_reason": "tool_calls"}]}\n\ndata: [DONE]\n\n',
    ),
    "pieces of another answer": (
        *("openai", "responses"),
        'data: {"type": "response.output_text.delta", "delta": "Yes"}\n\n'
        'data: {"type": "response.completed", "response": {"status": "completed", "output": '
        '[{"type": "message", "content": [{"type": "output_text", "text": "No"}]}]}}\n\n',
    ),
    "end without the whole": ("openai", "responses", 'data: {"type": "response.completed"}\n\n'),
    "incomplete without a reason": (
        *("openai", "responses"),
        'data: {"type": "response.incomplete", "response": '
        '{"status": "incomplete", "output": []}}\n\n',
    ),
    "paused": (
        *("anthropic", "chat"),
        'data: {"type": "message_delta", "delta": {"stop_reason": "pause_turn"}}\n\n'
        'data: {"type": "message_stop"}\n\n',
    ),
    "unloaded": ("ollama", "chat", '{"done": true, "done_reason": "unload"}\n'),
}


@pytest.mark.parametrize(("kind", "api", "body"), LIES.values(), ids=LIES)
async def test_streams_that_contradict_themselves(
    server: ModelServer, kind: str, api: str, body: str
) -> None:
    wire = next(wire for wire in WIRES if wire == (kind, api))
    async with running_provider(server.endpoint(*wire)) as provider:
        server.behave(answer(200, body.encode(), STREAM_TYPES.get(kind, "text/event-stream")))
        assert judged(await failure(provider, is_streamed=True)) == GARBAGE


async def test_a_response_that_failed(server: ModelServer) -> None:
    async with running_provider(server.endpoint("openai", "responses")) as provider:
        failed = '{"status": "failed", "output": [], "error": {"code": "server_error"}}'
        event = f'data: {{"type": "response.failed", "response": {failed}}}\n\n'
        server.behave(
            answer(200, failed.encode()), answer(200, event.encode(), "text/event-stream")
        )
        for is_streamed in (False, True):
            error = await failure(provider, is_streamed=is_streamed)
            assert judged(error) == ("provider_failed", True, True, None)
            assert str(error) == "models: the answer is an error: server_error"


async def test_a_request_that_is_no_text(provider: Provider, server: ModelServer) -> None:
    """Half a surrogate pair can not be written as UTF-8."""
    with pytest.raises(LlmUnavailableError) as caught:
        await provider.chat(asked(Message(ChatRole.USER, PROMPT + "\ud800")))
    assert judged(caught.value) == ("provider_refused", False, False, None)
    assert not leaked("".join(traceback.format_exception(caught.value)))
    assert server.requests == []


async def test_good_answers_are_told_nobody_either(
    provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "httpcore")
    for on_text in (None, lambda _: None):
        found = await provider.chat(asked(Message(ChatRole.USER, PROMPT)), on_text)
        assert found.text == ANSWER
    assert caplog.records
