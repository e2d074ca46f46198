"""Registrations of the kind `http`: what their config may say, and secrets that stay secret."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.adapters.capabilities.egress import EgressPolicy
from app.adapters.capabilities.egress_transport import EgressTransport
from app.adapters.capabilities.http import HttpAdapter
from app.adapters.capabilities.secrets import SecretStore
from app.ports import CallFailed
from tests.capability_samples import call_of, http_capability
from tests.far_side import Exchange, FarSide, answer, far_side

CANARY = "Bearer c4n4ry-s3cr3t-0123456789"


@pytest.fixture
async def side() -> AsyncIterator[FarSide]:
    async with far_side() as running:
        yield running


@pytest.fixture
async def adapter(side: FarSide) -> AsyncIterator[HttpAdapter]:
    secrets = SecretStore(
        {
            "token": (CANARY, [f"127.0.0.1:{side.port}"]),
            "elsewhere": (CANARY, ["api.example.org"]),
        }
    )
    running = HttpAdapter(EgressTransport(EgressPolicy(["127.0.0.1"])), secrets)
    yield running
    await running.aclose()


async def test_a_secret_is_sent_and_never_seen_again(
    adapter: HttpAdapter, side: FarSide, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    capability = http_capability(
        {"url": side.url, "secret_headers": {"Authorization": "token", "X-Key": "token"}}
    )
    call = call_of(capability, {})

    async def echo(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        bare = exchange.headers["authorization"].removeprefix("Bearer ")
        body = b'{"whole": "%b", "%b": ["x %b x"]}' % tuple(
            text.encode() for text in (exchange.headers["authorization"], bare, bare)
        )
        await answer(200, body)(writer, exchange)

    async def complain(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        detail = b'{"detail": "bad token %b"}' % exchange.headers["authorization"].encode()
        await answer(401, detail)(writer, exchange)

    side.behave = echo
    output = await adapter.invoke(call)
    assert side.exchanges[0].headers["authorization"] == CANARY
    assert output == {"whole": "[secret]", "[secret]": ["x [secret] x"]}
    side.behave = complain
    with pytest.raises(CallFailed) as caught:
        await adapter.invoke(call)
    assert caught.value.message == "answered 401: bad token [secret]"
    seen = repr(caught.value) + caplog.text + repr(adapter) + repr(call) + str(vars(adapter))
    assert "c4n4ry" not in seen


@pytest.mark.parametrize(
    ("config", "pointers"),
    [
        ({}, ["/config/url"]),
        ({"url": 5}, ["/config/url"]),
        ({"url": "https://example.org/", "verify": False}, ["/config/verify"]),
        ({"url": "file:///etc/passwd"}, ["/config/url"]),
        ({"url": "http://10.0.0.1/"}, ["/config/url"]),
        ({"url": "https://u:p@example.org/"}, ["/config/url"]),
        ({"url": "https://example.org/", "headers": []}, ["/config/headers"]),
        ({"url": "https://example.org/", "headers": {"Host": "x"}}, ["/config/headers/Host"]),
        ({"url": "https://example.org/", "headers": {"A b": "x"}}, ["/config/headers/A b"]),
        ({"url": "https://example.org/", "headers": {"A": "x\r\nB: y"}}, ["/config/headers/A"]),
        ({"url": "https://example.org/", "headers": {"A": "x\n"}}, ["/config/headers/A"]),
        ({"url": "https://example.org/", "headers": {"A": 1}}, ["/config/headers/A"]),
        (
            {"url": "https://example.org/", "headers": {"Idempotency-Key": "x"}},
            ["/config/headers/Idempotency-Key"],
        ),
        (
            {"url": "https://example.org/", "secret_headers": {"Authorization": "token"}},
            ["/config/secret_headers/Authorization"],
        ),
        (
            {"url": "https://example.org/", "secret_headers": {"Authorization": "missing"}},
            ["/config/secret_headers/Authorization"],
        ),
        (
            {"url": "http://api.example.org/", "secret_headers": {"Authorization": "elsewhere"}},
            ["/config/secret_headers"],
        ),
        (
            {
                "url": "https://api.example.org/",
                "headers": {"authorization": "x"},
                "secret_headers": {"Authorization": "elsewhere"},
            },
            ["/config/secret_headers/Authorization"],
        ),
        (
            {
                "url": "https://api.example.org./v1",
                "secret_headers": {"Authorization": "elsewhere"},
            },
            [],
        ),
        ({"url": "https://example.org/", "headers": {"X-A": "b", "Authorization": "mine"}}, []),
    ],
)
async def test_check(adapter: HttpAdapter, config: dict[str, Any], pointers: list[str]) -> None:
    capability = http_capability(config)
    faults = adapter.check(capability)
    assert [fault.pointer for fault in faults] == pointers
    assert all(fault.capability_id == "far.side" for fault in faults)
    if faults:
        with pytest.raises(CallFailed) as caught:
            await adapter.invoke(call_of(capability, {}))
        assert caught.value.code in ("egress_refused", "capability_misconfigured")
        assert not caught.value.retryable


def test_a_missing_secret_and_one_for_another_host_look_alike() -> None:
    adapter = HttpAdapter(
        EgressTransport(EgressPolicy()), SecretStore({"here": (CANARY, ["a.example.org"])})
    )
    messages = {
        fault.message.replace("here", "gone")
        for name in ("here", "gone")
        for fault in adapter.check(
            http_capability({"url": "https://b.example.org/", "secret_headers": {"A": name}})
        )
    }
    assert len(messages) == 1


def test_a_secret_that_is_no_header_value_is_an_error_at_the_start() -> None:
    with pytest.raises(ValueError, match="'bad'") as caught:
        SecretStore({"bad": ("c4n4ry\r\nX: y", ["a.example.org"])})
    assert "c4n4ry" not in str(caught.value)
