"""The kind `http` against a real server that misbehaves in every way we could think of."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from app.adapters.capabilities.egress import EgressPolicy
from app.adapters.capabilities.egress_transport import EgressTransport
from app.adapters.capabilities.http import HttpAdapter
from app.domain.capability import Effect
from app.ports import CallFailed
from tests.capability_samples import TRACEPARENT, call_of, http_capability
from tests.far_side import Behaviour, Exchange, FarSide, answer, far_side, raw

LIMIT = 50_000
DEADLINE_MS = 1_000
"""One that must be met by who hangs, but not before a request is sent and a head is read."""


@pytest.fixture
async def side() -> AsyncIterator[FarSide]:
    async with far_side() as running:
        yield running


@pytest.fixture
async def adapter() -> AsyncIterator[HttpAdapter]:
    transport = EgressTransport(EgressPolicy(["127.0.0.1"]))
    running = HttpAdapter(transport, response_bytes_max=LIMIT)
    yield running
    await running.aclose()


async def failure(
    adapter: HttpAdapter,
    side: FarSide,
    behave: Behaviour,
    *,
    effect: Effect = Effect.IDEMPOTENT,
    deadline_ms: int = 10_000,
) -> CallFailed:
    side.behave = behave
    call = call_of(http_capability({"url": side.url}, effect), {}, deadline_ms)
    with pytest.raises(CallFailed) as caught:
        await adapter.invoke(call)
    return caught.value


async def test_the_request_and_a_good_answer(adapter: HttpAdapter, side: FarSide) -> None:
    side.behave = answer(201, b'{"n": 1, "deep": {"a": ["\xc3\xa9"]}}')
    config = {"url": side.url + "?v=1#part", "headers": {"X-Team": "blue"}}
    output = await adapter.invoke(call_of(http_capability(config), {"q": "\u00e9", "n": 2}))
    assert output == {"n": 1, "deep": {"a": ["\u00e9"]}}
    (exchange,) = side.exchanges
    assert (exchange.method, exchange.target) == ("POST", "/call?v=1")
    assert list(exchange.json.items()) == [
        ("run_id", "run-1"),
        ("node_id", "A"),
        ("attempt", 2),
        ("idempotency_key", "run-1:A:1"),
        ("objective", "find out"),
        ("instructions", "look closely"),
        ("inputs", {"q": "\u00e9", "n": 2}),
        ("deadline_ms", 10_000),
    ]
    assert exchange.headers == {
        "host": f"127.0.0.1:{side.port}",
        "accept": "application/json",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "content-length": str(len(exchange.body)),
        "idempotency-key": "run-1:A:1",
        "traceparent": TRACEPARENT,
        "x-team": "blue",
    }


STATUSES = [
    (400, "capability_refused", False, False),
    (401, "capability_refused", False, False),
    (404, "capability_refused", False, False),
    (409, "capability_refused", False, False),
    (422, "capability_refused", False, False),
    (408, "capability_unavailable", True, True),
    (429, "capability_overloaded", True, False),
    (500, "capability_unavailable", True, True),
    (502, "capability_unavailable", True, True),
    (503, "capability_unavailable", True, True),
    (504, "capability_unavailable", True, True),
    (300, "capability_refused", False, False),
    (304, "capability_refused", False, False),
]


@pytest.mark.parametrize(("status", "code", "retryable", "unknown"), STATUSES)
async def test_statuses(
    adapter: HttpAdapter, side: FarSide, status: int, code: str, retryable: bool, unknown: bool
) -> None:
    for effect in Effect:
        body = b"" if status == 304 else b"{}"
        failed = await failure(adapter, side, answer(status, body), effect=effect)
        assert (failed.code, failed.retryable, failed.unknown_outcome) == (code, retryable, unknown)
        assert str(status) in failed.message


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), (" 0 ", 0), ("999999999", 86_400), ("soon", None), ("-1", None), ("1.5", None)],
)
async def test_retry_after(
    adapter: HttpAdapter, side: FarSide, value: str, seconds: float | None
) -> None:
    for status in (429, 503):
        failed = await failure(adapter, side, answer(status, Retry_After=value))
        assert failed.retry_after_s == seconds


async def test_retry_after_as_a_date(adapter: HttpAdapter, side: FarSide) -> None:
    at = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    failed = await failure(adapter, side, answer(429, Retry_After=at))
    assert failed.retry_after_s is not None
    assert 90 < failed.retry_after_s <= 100
    past = await failure(adapter, side, answer(429, Retry_After="Mon, 01 Jan 2024 00:00:00 GMT"))
    assert past.retry_after_s == 0


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"detail": "no such account", "title": "Bad"}', "answered 422: no such account"),
        (b'{"title": "Bad"}', "answered 422: Bad"),
        (b'{"detail": "a\\u0000b\\u001b[31m\\n c"}', "answered 422: a b [31m c"),
        (b'{"detail": 5}', "answered 422"),
        (b"<html>oops</html>", "answered 422"),
        (b"", "answered 422"),
        (b"[1]", "answered 422"),
    ],
)
async def test_the_problem_detail(
    adapter: HttpAdapter, side: FarSide, body: bytes, shown: str
) -> None:
    failed = await failure(adapter, side, answer(422, body, "application/problem+json"))
    assert failed.message == shown


async def test_the_problem_detail_is_bounded(adapter: HttpAdapter, side: FarSide) -> None:
    failed = await failure(adapter, side, answer(422, b'{"detail": "' + b"x" * 5_000 + b'"}'))
    assert len(failed.message) < 350
    failed = await failure(adapter, side, answer(422, b'{"detail": "' + b"x" * 10**6 + b'"}'))
    assert failed.message == "answered 422"


GARBAGE = [
    answer(200, b"not json"),
    answer(200, b""),
    answer(204, b"", None),
    answer(200, b"[1, 2]"),
    answer(200, b'"text"'),
    answer(200, b"null"),
    answer(200, b'{"a": NaN}'),
    answer(200, b'{"a": 1e999}'),
    answer(200, b'{"a": 1, "a": 2}'),
    answer(200, b'{"a": "\\u0000"}'),
    answer(200, b'{"a": "\\ud800"}'),
    answer(200, b'{"a": 123456789012345678901234567890}'),
    answer(200, b'{"a": "\xff"}'),
    answer(200, b'{"a":' * 2_000 + b"1" + b"}" * 2_000),
    answer(200, b"{}", "text/html"),
    answer(200, b"{}", "application/jsonp"),
    answer(200, b'{"a": "' + b"x" * LIMIT + b'"}'),
    answer(200, gzip.compress(b'{"a": "' + b"x" * 10**7 + b'"}'), Content_Encoding="gzip"),
    answer(200, b"{}", Content_Encoding="gzip"),
    answer(200, b"{}", Content_Encoding="br"),
]


@pytest.mark.parametrize("behave", GARBAGE)
async def test_a_useless_answer_is_definite(
    adapter: HttpAdapter, side: FarSide, behave: Behaviour
) -> None:
    for effect in Effect:
        failed = await failure(adapter, side, behave, effect=effect)
        assert failed.code == "capability_garbage"
        assert not failed.unknown_outcome
        assert failed.retryable == (effect is not Effect.AT_MOST_ONCE)


@pytest.mark.parametrize(
    "behave",
    [
        answer(200, b'{"a": 1}', None),
        answer(200, b'{"a": 1}', "application/json; charset=utf-8"),
        answer(200, b'{"a": 1}', "application/vnd.far+json"),
        answer(200, gzip.compress(b'{"a": 1}'), Content_Encoding="gzip"),
        raw(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b'3\r\n{"a\r\n5\r\n": 1}\r\n0\r\n\r\n'
        ),
        raw(b'HTTP/1.1 200 OK\r\n\r\n{"a": 1}'),
        raw(b'HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 1}'),
    ],
)
async def test_answers_that_are_fine(
    adapter: HttpAdapter, side: FarSide, behave: Behaviour
) -> None:
    side.behave = behave
    assert await adapter.invoke(call_of(http_capability({"url": side.url}), {})) == {"a": 1}


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"


@pytest.mark.parametrize(
    "behave",
    [
        raw(b"", reset=True),
        raw(b""),
        raw(b"HTTP/1.1 2"),
        raw(HEAD + b'{"a":', reset=True),
        raw(HEAD + b'{"a":'),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300_000 + b"\r\n\r\n{}"),
    ],
)
async def test_a_broken_connection_leaves_the_outcome_unknown(
    adapter: HttpAdapter, side: FarSide, behave: Behaviour
) -> None:
    failed = await failure(adapter, side, behave)
    assert failed.code == "capability_connection_lost"
    assert failed.retryable
    assert failed.unknown_outcome


def hangs(side: FarSide, head: bytes) -> Behaviour:
    async def behave(writer: asyncio.StreamWriter, _exchange: Exchange) -> None:
        writer.write(head)
        await writer.drain()
        await side.closing.wait()

    return behave


def drips(side: FarSide, head: bytes) -> Behaviour:
    """One byte at a time, so that no read ever waits long."""

    async def behave(writer: asyncio.StreamWriter, _exchange: Exchange) -> None:
        writer.write(head)
        while not side.closing.is_set() and not writer.is_closing():
            writer.write(b" ")
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(side.closing.wait(), 0.01)

    return behave


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n", HEAD, HEAD + b'{"a"'])
async def test_a_server_that_hangs_meets_the_deadline(
    adapter: HttpAdapter, side: FarSide, head: bytes
) -> None:
    await meets_the_deadline(adapter, side, hangs(side, head))


async def test_a_body_that_drips_meets_the_deadline(adapter: HttpAdapter, side: FarSide) -> None:
    await meets_the_deadline(adapter, side, drips(side, HEAD.replace(b"100", b"40000")))


async def meets_the_deadline(adapter: HttpAdapter, side: FarSide, behave: Behaviour) -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    failed = await failure(adapter, side, behave, deadline_ms=DEADLINE_MS)
    assert failed.code == "capability_timeout"
    assert failed.unknown_outcome
    assert loop.time() - started < 20


async def test_a_status_counts_although_its_body_never_comes(
    adapter: HttpAdapter, side: FarSide
) -> None:
    head = b"HTTP/1.1 400 Bad\r\nContent-Length: 100\r\n\r\n{"
    failed = await failure(adapter, side, hangs(side, head), deadline_ms=DEADLINE_MS)
    assert (failed.code, failed.unknown_outcome) == ("capability_refused", False)
    failed = await failure(adapter, side, raw(head, reset=True))
    assert (failed.code, failed.unknown_outcome) == ("capability_refused", False)


async def test_a_huge_body_is_not_read_to_its_end(adapter: HttpAdapter, side: FarSide) -> None:
    written = 0

    async def behave(writer: asyncio.StreamWriter, _exchange: Exchange) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while written < 500_000_000:
            writer.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
            written += 65_536
            await writer.drain()

    failed = await failure(adapter, side, behave)
    assert failed.code == "capability_garbage"
    await side.gone.wait()
    assert written < 50_000_000


async def test_before_the_first_byte_nothing_is_unknown(adapter: HttpAdapter) -> None:
    async with far_side() as other:
        port = other.port
    config = {"url": f"http://127.0.0.1:{port}/"}
    with pytest.raises(CallFailed) as caught:
        await adapter.invoke(call_of(http_capability(config), {}))
    assert caught.value.code == "capability_unreachable"
    assert caught.value.retryable
    assert not caught.value.unknown_outcome


async def test_a_spent_deadline_sends_nothing(adapter: HttpAdapter, side: FarSide) -> None:
    failed = await failure(adapter, side, answer(), deadline_ms=0)
    assert (failed.code, failed.unknown_outcome) == ("capability_timeout", False)
    assert side.exchanges == []


async def test_a_resolver_that_hangs_is_no_unknown_outcome() -> None:
    async def never(_host: str, _port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    adapter = HttpAdapter(EgressTransport(EgressPolicy(resolver=never)))
    call = call_of(http_capability({"url": "https://example.org/"}), {}, deadline_ms=50)
    with pytest.raises(CallFailed) as caught:
        await adapter.invoke(call)
    assert (caught.value.code, caught.value.unknown_outcome) == ("capability_timeout", False)
    await adapter.aclose()


async def test_redirects_are_not_followed(adapter: HttpAdapter, side: FarSide) -> None:
    async with far_side() as canary:
        for status in (301, 302, 303, 307, 308):
            failed = await failure(adapter, side, answer(status, Location=canary.url))
            assert failed.code == "capability_refused"
            assert not failed.retryable
        assert canary.connections == 0


async def test_a_private_target_is_refused_at_the_call(side: FarSide) -> None:
    for url in (side.url, side.url.replace("127.0.0.1", "localhost")):
        adapter = HttpAdapter(EgressTransport(EgressPolicy()))
        with pytest.raises(CallFailed) as caught:
            await adapter.invoke(call_of(http_capability({"url": url}), {}))
        assert caught.value.code == "egress_refused"
        assert not caught.value.retryable
        await adapter.aclose()
    assert side.connections == 0


async def test_cancelling_a_call_closes_its_connection(adapter: HttpAdapter, side: FarSide) -> None:
    async def behave(_writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        await exchange.reader.read()
        raise ConnectionError

    side.behave = behave
    call = call_of(http_capability({"url": side.url}), {})
    task = asyncio.ensure_future(adapter.invoke(call))
    await side.arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await side.gone.wait()


async def test_connections_are_kept_except_for_at_most_once(
    adapter: HttpAdapter, side: FarSide
) -> None:
    side.behave = answer()
    for effect in (Effect.PURE, Effect.IDEMPOTENT, Effect.AT_MOST_ONCE, Effect.AT_MOST_ONCE):
        await adapter.invoke(call_of(http_capability({"url": side.url}, effect), {}))
    assert [exchange.connection for exchange in side.exchanges] == [1, 1, 2, 3]


async def test_cookies_are_not_kept(adapter: HttpAdapter, side: FarSide) -> None:
    side.behave = answer(Set_Cookie="a=b")
    for _ in range(2):
        await adapter.invoke(call_of(http_capability({"url": side.url}), {}))
    assert "cookie" not in side.exchanges[1].headers
