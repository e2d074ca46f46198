"""The capability kind `http`: a node is one POST to a server of the registration's owner.

    config: {"url": "https://…", "headers": {…}, "secret_headers": {"Authorization": "<name>"}}

The request is the JSON object `{run_id, node_id, attempt, idempotency_key, objective, instructions,
inputs, deadline_ms}` with the headers Idempotency-Key and traceparent; a 2xx JSON object is the
output. What every other outcome means stands in `http_outcome.py`. The deadline covers everything
from the resolver to the last byte of the body, so that a slow body can not outlive it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Any

import httpx
import orjson

from app.adapters.capabilities.egress import EgressRefused
from app.adapters.capabilities.egress_transport import (
    FRESH_CONNECTION,
    EgressTransport,
    SendProgress,
)
from app.adapters.capabilities.http_body import BodyRefused, read_body, read_prefix
from app.adapters.capabilities.http_outcome import (
    DETAIL_BYTES_MAX,
    broken_off,
    detail_of,
    garbage,
    refused_target,
    status_failure,
    timed_out,
)
from app.adapters.capabilities.http_target import Target, TargetRules, as_faults, host_scope
from app.adapters.capabilities.secrets import SecretStore, redacted
from app.domain.capability import Capability, Effect
from app.domain.errors import Fault
from app.kit.json_gate import JsonRefused, parse_json
from app.ports import Call, CallFailed

RESPONSE_BYTES_MAX = 2 * 1024 * 1024
CONNECT_TIMEOUT_S = 10.0
DETAIL_TIMEOUT_S = 2.0

_JSON_TYPE = re.compile(r"^application/(?:json|[a-z0-9!#$&^_.-]{1,100}\+json)$")


class HttpAdapter:
    """Runs `http` capabilities over one guarded transport.

    The adapter owns the transport: `aclose()` closes it. It keeps no cookies and follows no
    redirects; one call is one exchange.
    """

    def __init__(
        self,
        transport: EgressTransport,
        secrets: SecretStore | None = None,
        *,
        response_bytes_max: int = RESPONSE_BYTES_MAX,
    ) -> None:
        self._transport = transport
        self._rules = TargetRules("http", transport.policy, secrets or SecretStore())
        self._response_bytes_max = response_bytes_max

    async def aclose(self) -> None:
        """Close the transport; calls under way fail."""
        await self._transport.aclose()

    def check(self, capability: Capability) -> list[Fault]:
        """Faults with pointers into `/config`: its shape, the URL, headers and secrets.

        Names are not resolved here: what they stand for is judged at every connection.
        """
        return as_faults(self._rules.faults(capability.registration.config), capability)

    def inline(self, capability: Capability) -> None:
        """Never: every call waits for the network."""
        return

    def breaker_scope(self, capability: Capability, tenant_id: str) -> str | None:
        """`tool::host[:port]`; with the tenant where the credentials are the tenant's own."""
        return host_scope(capability, tenant_id)

    async def invoke(self, call: Call) -> dict[str, Any]:
        """The output of one exchange; raises `CallFailed` as `http_outcome` tells."""
        target = self._rules.target(call.capability.registration.config)
        progress = SendProgress()
        failed: CallFailed | None = None
        request = _request(call, target, progress)
        deadline_s = call.deadline_ms / 1000
        if deadline_s <= 0:
            raise timed_out(sent=False)
        try:
            async with asyncio.timeout(deadline_s):
                response = await self._transport.handle_async_request(request)
                async with contextlib.aclosing(response):
                    if not response.is_success:
                        # Known from here on, even if the body with the reasons never comes.
                        failed = status_failure(response, "")
                        raise await _failure(response, target.secrets)
                    body = await read_body(response, self._response_bytes_max)
        except EgressRefused as error:
            raise refused_target(error) from error
        except TimeoutError as error:
            raise failed or timed_out(sent=progress.sent) from error
        except httpx.HTTPError as error:
            raise broken_off(error, sent=progress.sent) from error
        except BodyRefused as error:
            raise _garbage(call, f"can not be read: {error}") from error
        return _output(call, response, body, target.secrets)


def _request(call: Call, target: Target, progress: SendProgress) -> httpx.Request:
    try:
        body = orjson.dumps(
            {
                "run_id": call.run_id,
                "node_id": call.node_id,
                "attempt": call.attempt,
                "idempotency_key": call.idempotency_key,
                "objective": call.objective,
                "instructions": call.instructions,
                "inputs": dict(call.inputs),
                "deadline_ms": call.deadline_ms,
            }
        )
    except orjson.JSONEncodeError as error:
        text = "the inputs can not be written as JSON"
        raise CallFailed("capability_error", text, retryable=False, target_failed=None) from error
    headers = {
        **target.headers,
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
        "Idempotency-Key": call.idempotency_key,
    }
    if call.traceparent:
        headers["traceparent"] = call.traceparent
    return httpx.Request(
        "POST",
        target.url.copy_with(fragment=None),
        headers=headers,
        content=body,
        extensions={
            "timeout": {"connect": CONNECT_TIMEOUT_S},
            "trace": progress,
            FRESH_CONNECTION: call.capability.registration.effect is Effect.AT_MOST_ONCE,
        },
    )


async def _failure(response: httpx.Response, secrets: tuple[str, ...]) -> CallFailed:
    """The failure of a status outside 2xx, with the detail of its body if that arrives soon."""
    body = b""
    with contextlib.suppress(httpx.HTTPError, TimeoutError):
        async with asyncio.timeout(DETAIL_TIMEOUT_S):
            body = await read_prefix(response, DETAIL_BYTES_MAX)
    return status_failure(response, detail_of(body, secrets))


def _output(
    call: Call, response: httpx.Response, body: bytes, secrets: tuple[str, ...]
) -> dict[str, Any]:
    media_type = response.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type and not _JSON_TYPE.match(media_type):
        raise _garbage(call, "is not of a JSON media type")
    try:
        output = parse_json(body)
    except JsonRefused as error:
        raise _garbage(call, f"is not strict JSON: {error.detail}") from error
    if not isinstance(output, dict):
        raise _garbage(call, "is not a JSON object")
    hidden: dict[str, Any] = redacted(output, secrets)
    return hidden


def _garbage(call: Call, what: str) -> CallFailed:
    return garbage(what, retryable=call.capability.registration.effect is not Effect.AT_MOST_ONCE)
