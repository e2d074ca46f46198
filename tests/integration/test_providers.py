"""The contract of `Provider`, held by every vendor's adapter against a server that speaks its wire.

What they send is in test_provider_requests.py, and what they do when the server misbehaves in
test_provider_failures.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from app.adapters.providers import OpenAiApi, ProviderKind, exchange, make_provider
from app.domain.chat import (
    AnswerForm,
    ChatAnswer,
    ChatRole,
    Embeddings,
    LlmUnavailableError,
    Message,
    StopReason,
    ToolCall,
    Usage,
)
from app.ports import Provider
from tests.far_side import answer
from tests.model_server import USAGE, ModelServer, running_model_server, say_nothing
from tests.model_wires import vector_of
from tests.providers import CALLS, OPEN_SCHEMA, WEATHER, WIRES, Wire, asked


@pytest.fixture(params=WIRES, ids="-".join)
def wire(request: pytest.FixtureRequest) -> Wire:
    found: Wire = request.param
    return found


@pytest.fixture
async def server() -> AsyncIterator[ModelServer]:
    async with running_model_server() as running:
        yield running


@pytest.fixture
async def provider(server: ModelServer, wire: Wire) -> AsyncIterator[Provider]:
    kind, api = wire
    running = make_provider(server.endpoint(kind, api))
    yield running
    await running.aclose()


ANSWERS = {
    "text": ChatAnswer("It fits: 21 °C, 🌡️ and more.", StopReason.END, USAGE),
    "empty": ChatAnswer("", StopReason.END, USAGE),
    "cut": ChatAnswer("It fi", StopReason.LENGTH, USAGE),
    "uncounted": ChatAnswer("It fits.", StopReason.END, None),
    "calls": ChatAnswer("", StopReason.TOOLS, USAGE, CALLS),
    "text and calls": ChatAnswer("Let me look.", StopReason.TOOLS, Usage(1, 0, 0), CALLS[:1]),
    "refused": ChatAnswer("I can not help with that.", StopReason.REFUSED, USAGE),
}


def as_told_by(wire: Wire, said: ChatAnswer) -> ChatAnswer:
    """Ollama counts no cached tokens and knows no refusals."""
    if wire[0] != "ollama":
        return said
    stop = StopReason.END if said.stop is StopReason.REFUSED else said.stop
    usage = said.usage and replace(said.usage, tokens_cached=0)
    return replace(said, stop=stop, usage=usage)


@pytest.mark.parametrize("said", ANSWERS.values(), ids=ANSWERS)
async def test_an_answer_is_the_same_whole_and_streamed(
    provider: Provider, server: ModelServer, wire: Wire, said: ChatAnswer
) -> None:
    server.say(said)
    expected = as_told_by(wire, said)
    assert await provider.chat(asked(tools=(WEATHER,))) == expected
    pieces: list[str] = []
    assert await provider.chat(asked(tools=(WEATHER,)), pieces.append) == expected
    assert "".join(pieces) == said.text
    assert all(pieces)
    assert len(pieces) == -(-len(said.text) // 4)


async def test_a_schema_beside_tools_leaves_the_model_the_choice(server: ModelServer) -> None:
    provider = make_provider(server.endpoint("anthropic"))
    request = asked(form=AnswerForm.JSON, schema=OPEN_SCHEMA, tools=(WEATHER,))
    calling = ChatAnswer("", StopReason.TOOLS, USAGE, CALLS[:1])
    server.say(calling, calling, ChatAnswer("{}", StopReason.END, USAGE))
    assert await provider.chat(request) == calling
    assert await provider.chat(request, lambda _: None) == calling
    assert [tool["name"] for tool in server.requests[0].json["tools"]] == ["weather", "give_answer"]
    pieces: list[str] = []
    for told in (None, pieces.append):
        assert (await provider.chat(request, told)).text == "{}"
    assert pieces == ["{}"]
    await provider.aclose()


async def test_ollama_is_held_to_no_format_while_it_may_call_tools(server: ModelServer) -> None:
    provider = make_provider(server.endpoint("ollama"))
    await provider.chat(asked(form=AnswerForm.JSON, schema=OPEN_SCHEMA, tools=(WEATHER,)))
    await provider.chat(asked(form=AnswerForm.JSON, schema=OPEN_SCHEMA))
    bodies = [request.json for request in server.requests]
    assert ["format" in body for body in bodies] == [False, True]
    assert ["tools" in body for body in bodies] == [True, False]
    await provider.aclose()


@pytest.mark.parametrize("kind", ["anthropic", "ollama"])
@pytest.mark.parametrize("arguments", ["", "[1]", '{"city": '])
async def test_arguments_that_are_no_object_are_not_sent(
    server: ModelServer, kind: ProviderKind, arguments: str
) -> None:
    provider = make_provider(server.endpoint(kind))
    call = ToolCall("call_a", "weather", arguments)
    with pytest.raises(LlmUnavailableError) as caught:
        await provider.chat(asked(Message(ChatRole.ASSISTANT, "", (call,))))
    failed = caught.value
    assert (failed.code, failed.retryable, failed.target_failed) == (
        "provider_refused",
        False,
        False,
    )
    assert server.requests == []
    await provider.aclose()


async def test_calls_without_ids_get_some(server: ModelServer) -> None:
    """Ollama's servers of 2024 gave none."""
    provider = make_provider(server.endpoint("ollama"))
    calls = b'{"function":{"name":"weather","arguments":{}}}'
    body = b'{"message":{"content":"","tool_calls":[%b,%b]},"done":true}' % (calls, calls)
    server.behave(answer(200, body))
    found = await provider.chat(asked())
    assert found.stop is StopReason.TOOLS
    assert [call.call_id for call in found.tool_calls] == ["call_0", "call_1"]
    await provider.aclose()


async def test_a_content_filter_is_a_refusal(server: ModelServer) -> None:
    filtered = b'{"choices":[{"message":{"content":"Well"},"finish_reason":"content_filter"}]}'
    cut = (
        b'{"status":"incomplete","incomplete_details":{"reason":"content_filter"},"output":'
        b'[{"type":"message","content":[{"type":"output_text","text":"Well"}]}]}'
    )
    apis: list[tuple[OpenAiApi, bytes]] = [("chat", filtered), ("responses", cut)]
    for api, body in apis:
        provider = make_provider(server.endpoint("openai", api))
        server.behave(answer(200, body))
        assert await provider.chat(asked()) == ChatAnswer("Well", StopReason.REFUSED)
        await provider.aclose()


@pytest.mark.parametrize("counts", ["true, 5", "-1, 5", '"12", 5', "12.5, 5", "12, null", "3, 5"])
async def test_counts_that_can_not_be_true_are_none(server: ModelServer, counts: str) -> None:
    tokens_in, tokens_out = counts.split(", ")
    usage = (
        f'{{"prompt_tokens":{tokens_in},"completion_tokens":{tokens_out},'
        '"prompt_tokens_details":{"cached_tokens":4}}'
    )
    body = f'{{"choices":[{{"message":{{"content":"x"}},"finish_reason":"stop"}}],"usage":{usage}}}'
    provider = make_provider(server.endpoint("openai"))
    server.behave(answer(200, body.encode()))
    assert await provider.chat(asked()) == ChatAnswer("x", StopReason.END)
    await provider.aclose()


# --- the rest of the contract ---------------------------------------------------------------------


async def test_embeddings(provider: Provider, server: ModelServer, wire: Wire) -> None:
    texts = ["one", "three", ""]
    if wire[0] == "anthropic":
        with pytest.raises(LlmUnavailableError, match="models has no embeddings") as caught:
            await provider.embed("small-1", texts, 10)
        assert (caught.value.code, caught.value.retryable) == ("provider_refused", False)
        assert server.requests == []
        return
    vectors = tuple(tuple(vector_of(text)) for text in texts)
    found = await provider.embed("small-1", texts, 10)
    assert found == Embeddings(vectors, Usage(3, 0))
    assert all(type(number) is float for vector in found.vectors for number in vector)
    (request,) = server.requests
    body = {"model": "small-1", "input": texts}
    if wire[0] == "ollama":
        assert (request.target, request.json) == ("/api/embed", {**body, "truncate": False})
    else:
        assert (request.target, request.json) == ("/v1/embeddings", body)


async def test_models_are_sorted(provider: Provider, server: ModelServer, wire: Wire) -> None:
    server.models = ["b", "a", "c:latest"]
    assert await provider.models(10) == ["a", "b", "c:latest"]
    (request,) = server.requests
    path = {"anthropic": "/v1/models?limit=1000", "ollama": "/api/tags"}.get(wire[0], "/v1/models")
    assert (request.method, request.target, request.body) == ("GET", path, b"")
    assert "content-type" not in request.headers


async def test_a_connection_is_used_again(
    provider: Provider, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After whole answers, streamed ones and errors alike."""
    monkeypatch.setattr(exchange, "DRAIN_S", 10.0)
    for _ in range(2):
        await provider.chat(asked())
        await provider.chat(asked(), lambda _: None)
        server.behave(answer(429, b"{}"))
        with pytest.raises(LlmUnavailableError):
            await provider.chat(asked())
        await provider.models(10)
    assert len(server.requests) == 8
    assert server.side.connections == 1


async def test_calls_run_side_by_side(provider: Provider, server: ModelServer) -> None:
    server.say("It fits.")
    found = await asyncio.gather(*(provider.chat(asked()) for _ in range(20)))
    assert {one.text for one in found} == {"It fits."}
    assert len(server.requests) == 20


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_cancelling_ends_the_exchange(
    provider: Provider, server: ModelServer, is_streamed: bool
) -> None:
    server.say("A long answer, of which half is told.")
    server.behave(server.break_down if is_streamed else say_nothing)
    told = asyncio.Event()
    on_text = (lambda _: told.set()) if is_streamed else None
    call = asyncio.create_task(provider.chat(asked(), on_text))
    await server.reached(1)
    if is_streamed:
        await told.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await server.side.gone.wait()


async def test_what_the_listener_raises_ends_the_exchange(
    provider: Provider, server: ModelServer
) -> None:
    def refuse(_piece: str) -> None:
        raise LookupError("enough")

    server.say("A long answer, of which half is told.")
    server.behave(server.break_down)
    with pytest.raises(LookupError, match="enough"):
        await provider.chat(asked(), refuse)
    await server.side.gone.wait()


async def test_closing_lets_go_of_connections(provider: Provider, server: ModelServer) -> None:
    await provider.models(10)
    await provider.aclose()
    await server.side.gone.wait()
