"""Calls of the kind `http` that end before the far side is asked: its breaker learns nothing."""

from __future__ import annotations

from typing import Any

import pytest

from app.adapters.capabilities.egress import EgressPolicy
from app.adapters.capabilities.egress_transport import EgressTransport
from app.adapters.capabilities.http import HttpAdapter
from app.ports import CallFailed
from tests.capability_samples import call_of, http_capability

URL = "https://example.org/"


async def nowhere_good(_host: str, _port: int) -> list[str]:
    return ["10.0.0.1"]


@pytest.mark.parametrize(
    ("code", "config", "inputs"),
    [
        ("egress_refused", {"url": "http://127.0.0.1/"}, {}),
        ("egress_refused", {"url": URL}, {}),
        ("capability_misconfigured", {"url": URL, "secret_headers": {"A": "gone"}}, {}),
        ("capability_error", {"url": URL}, {"n": 1 << 70}),
    ],
)
async def test_a_call_that_was_not_made_is_no_verdict(
    code: str, config: dict[str, Any], inputs: dict[str, Any]
) -> None:
    adapter = HttpAdapter(EgressTransport(EgressPolicy(resolver=nowhere_good)))
    with pytest.raises(CallFailed) as caught:
        await adapter.invoke(call_of(http_capability(config), inputs))
    await adapter.aclose()

    assert (caught.value.code, caught.value.target_failed) == (code, None)
