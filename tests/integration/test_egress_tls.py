"""TLS behind the guard: the socket goes to a judged address, the certificate is the name's."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator

import httpx
import pytest
import trustme

from app.adapters.capabilities.egress import EgressPolicy
from app.adapters.capabilities.egress_transport import EgressTransport
from tests.far_side import FarSide, answer, far_side

AUTHORITY = trustme.CA()
GOOD = "good.example.org"
EVIL = "evil.example.org"


@pytest.fixture
async def side() -> AsyncIterator[FarSide]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert(GOOD).configure_cert(context)
    async with far_side(context) as running:
        running.behave = answer()
        yield running


@pytest.fixture
async def transport() -> AsyncIterator[EgressTransport]:
    async def to_loopback(_host: str, _port: int) -> list[str]:
        return ["127.0.0.1"]

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    AUTHORITY.configure_trust(context)
    policy = EgressPolicy(["127.0.0.1"], resolver=to_loopback)
    running = EgressTransport(policy, ssl_context=context)
    yield running
    await running.aclose()


async def ask(transport: EgressTransport, host: str, side: FarSide) -> int:
    url = f"https://{host}:{side.port}/"
    response = await transport.handle_async_request(httpx.Request("GET", url))
    await response.aread()
    return response.status_code


async def test_the_name_is_kept(transport: EgressTransport, side: FarSide) -> None:
    assert await ask(transport, GOOD, side) == 200
    assert side.exchanges[0].headers["host"] == f"{GOOD}:{side.port}"


async def test_a_certificate_of_another_name_is_refused(
    transport: EgressTransport, side: FarSide
) -> None:
    for host in (EVIL, "127.0.0.1"):
        with pytest.raises(httpx.ConnectError):
            await ask(transport, host, side)
    assert side.exchanges == []


async def test_a_connection_is_not_shared_between_names_of_one_address(
    transport: EgressTransport, side: FarSide
) -> None:
    assert await ask(transport, GOOD, side) == 200
    with pytest.raises(httpx.ConnectError):
        await ask(transport, EVIL, side)
    assert await ask(transport, GOOD, side) == 200
    assert [exchange.connection for exchange in side.exchanges] == [1, 1]


async def test_an_unknown_authority_is_refused(side: FarSide) -> None:
    async def to_loopback(_host: str, _port: int) -> list[str]:
        return ["127.0.0.1"]

    strict = EgressTransport(EgressPolicy(["127.0.0.1"], resolver=to_loopback))
    with pytest.raises(httpx.ConnectError):
        await ask(strict, GOOD, side)
    await strict.aclose()
