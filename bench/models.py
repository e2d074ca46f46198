"""What the gateway adds to one call of a model: selection, cache, budget, breaker, judgement.

The same requests, one at a time, to the same server of canned answers: once by httpx alone, once
through the gateway and the provider. The server stands in this process, so both pay for it alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import orjson

from app.adapters.breakers.local import LocalBreakers
from app.adapters.providers import Endpoint, make_provider
from app.domain.budget import Account
from app.domain.chat import AnswerForm, ChatRole, Message, Prompt
from app.domain.envelope import Budget
from app.llm.cache import AnswerCache
from app.llm.calls import Asker, ModelCalls, RetryPolicy
from app.llm.catalog import load_catalog
from app.llm.gateway import Gateway
from app.store.database import Database
from bench.rig import Rig
from bench.stats import Goal, percentile

CALLS = 400
WARM = 40
BARE = "one call of a model by httpx alone, p50"
GATEWAY = "one call of a model through the gateway, no cache, p50"
MISS = "one call of a model through gateway and cache, a miss, p50"
HIT = "the same question again, p50"
ADDED = "added to one call of a model by gateway and cache"
CATALOG = """
providers: {{near: {{kind: openai, base_url: "{url}/v1"}}}}
models:
  small: {{provider: near, ctx_window: 8000, output_tokens_max: 500, json_mode: true,
    function_calling: false, cost_tier: free, roles: [chat]}}
"""
BODY = orjson.dumps(
    {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": '{"verdict": "oats"}'},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17},
    }
)
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY)
) + BODY
TEXT = "The soil is loam, the field lies in the north. What grows there? " * 10


async def models(rig: Rig) -> None:
    """Both in turn, in each round."""
    calls = rig.count(CALLS, least=20)
    async with _canned() as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        bare = await _measure(lambda number: _bare(client, number), calls)
        file = rig.scratch / "models.yaml"
        file.write_text(CATALOG.format(url=url))
        catalog = load_catalog(file, lambda name: None)
        provider = make_provider(Endpoint("near", "openai", f"{url}/v1"))
        breakers = LocalBreakers(threshold=5, cooldown_s=30, worker_id_of=lambda: "bench")
        calls_of = ModelCalls(catalog, {"near": provider}, breakers, RetryPolicy())
        database = await Database.open(await rig.database("bench_models"))
        cache = AnswerCache(database)
        try:
            plain, cached = Gateway(catalog, calls_of), Gateway(catalog, calls_of, cache)
            through = await _measure(lambda number: _through(plain, number), calls)
            misses = await _measure(lambda number: _through(cached, number), calls)
            hits = await _measure(lambda number: _through(cached, number), calls)
        finally:
            await cache.aclose()
            await database.close()
            await provider.aclose()
    for name, took in ((BARE, bare), (GATEWAY, through), (MISS, misses), (HIT, hits)):
        rig.book.add(name, "ms", percentile(took, 0.5))
    added = percentile(misses, 0.5) - percentile(bare, 0.5)
    rig.book.add(ADDED, "ms", added, goal=Goal(1.5, 1.0))


async def _bare(client: httpx.AsyncClient, number: int) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": f"{number} {TEXT}"}]}
    response = await client.post("/v1/chat/completions", json=body)
    if response.json()["usage"]["total_tokens"] != 17:
        raise RuntimeError("not the canned answer")


async def _through(gateway: Gateway, number: int) -> None:
    prompt = Prompt(
        (Message(ChatRole.USER, f"{number} {TEXT}"),),
        form=AnswerForm.JSON,
        faults_of=lambda value: [],
    )
    asker = Asker(
        tenant_id="default",
        holder="bench:1",
        account=Account(Budget()),
        deadline=asyncio.get_running_loop().time() + 60,
        say=lambda event: None,
        heard=lambda transition: None,
    )
    completion = await gateway.complete(prompt, asker)
    if completion.value != {"verdict": "oats"}:
        raise RuntimeError("not the canned answer")


async def _measure(call: Callable[[int], Awaitable[None]], times: int) -> list[float]:
    """Milliseconds of each call, behind some that warm the connection up."""
    took = []
    for number in range(WARM + times):
        started = time.perf_counter()
        await call(number)
        if number >= WARM:
            took.append((time.perf_counter() - started) * 1000)
    return took


@asynccontextmanager
async def _canned() -> AsyncIterator[str]:
    """A server that gives every request the same answer, at once."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r")[0])
                await reader.readexactly(length)
                writer.write(ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
