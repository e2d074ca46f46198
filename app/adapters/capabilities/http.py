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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from app.adapters.capabilities.egress import EgressPolicy, EgressRefused
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
    plain_line,
    refused_target,
    status_failure,
    timed_out,
)
from app.adapters.capabilities.secrets import SecretRefused, SecretStore, redacted
from app.adapters.capabilities.text_lines import word_set
from app.domain.capability import Capability, Effect
from app.domain.errors import Fault
from app.kit.json_gate import JsonRefused, parse_json
from app.ports import Call, CallFailed

RESPONSE_BYTES_MAX = 2 * 1024 * 1024
CONNECT_TIMEOUT_S = 10.0
DETAIL_TIMEOUT_S = 2.0
HEADERS_MAX = 30

_HEADER_NAME = re.compile(r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}$")
_HEADER_VALUE = re.compile(r"^[\x20-\x7e\t]{0,4000}$")
_JSON_TYPE = re.compile(r"^application/(?:json|[a-z0-9!#$&^_.-]{1,100}\+json)$")
# Set by this adapter or by the transport; a registration must not take them over.
_OWN_HEADERS = word_set(
    """accept accept-encoding connection content-encoding content-length content-type expect host
    idempotency-key keep-alive proxy-authorization proxy-connection te traceparent tracestate
    trailer transfer-encoding upgrade"""
)


@dataclass(frozen=True, slots=True)
class _Target:
    """A checked config: where to send, with which headers; `secrets` are the values among them."""

    url: httpx.URL
    headers: dict[str, str]
    secrets: tuple[str, ...]


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
        self._policy: EgressPolicy = transport.policy
        self._secrets = secrets or SecretStore()
        self._response_bytes_max = response_bytes_max

    async def aclose(self) -> None:
        """Close the transport; calls under way fail."""
        await self._transport.aclose()

    def check(self, capability: Capability) -> list[Fault]:
        """Faults with pointers into `/config`: its shape, the URL, headers and secrets.

        Names are not resolved here: what they stand for is judged at every connection.
        """
        config = capability.registration.config
        return [
            Fault(code, message, "/config" + pointer, capability_id=capability.capability_id)
            for code, message, pointer in self._config_faults(config)
        ]

    def inline(self, capability: Capability) -> None:
        """Never: every call waits for the network."""
        return

    def breaker_scope(self, capability: Capability, tenant_id: str) -> str | None:
        """`tool::host[:port]`; with the tenant where the credentials are the tenant's own."""
        config = capability.registration.config
        url = httpx.URL(config["url"])
        scope = f"{capability.capability_id}::{url.netloc.decode('ascii')}"
        return f"{scope}::{tenant_id}" if config.get("headers") else scope

    async def invoke(self, call: Call) -> dict[str, Any]:
        """The output of one exchange; raises `CallFailed` as `http_outcome` tells."""
        target = self._target(call.capability)
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

    def _target(self, capability: Capability) -> _Target:
        """The target of a config that `check` passed; settings may have changed since."""
        config = capability.registration.config
        for code, message, _pointer in self._config_faults(config):
            is_target = code in EgressRefused.CODES
            shown = "egress_refused" if is_target else "capability_misconfigured"
            raise CallFailed(shown, message, retryable=False, target_failed=None)
        url = self._policy.check_url(config["url"])
        headers = dict(config.get("headers", {}))
        values = {
            header: self._secrets.value_for(name, url)
            for header, name in config.get("secret_headers", {}).items()
        }
        return _Target(url, {**headers, **values}, tuple(values.values()))

    def _config_faults(self, config: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
        """Code, message and pointer (in the config) of everything that is wrong."""
        for name in config.keys() - {"url", "headers", "secret_headers"}:
            yield "config_unexpected", f"an http capability takes no {name!r}", f"/{name}"
        address = config.get("url")
        if not isinstance(address, str):
            yield "config_invalid", "an http capability needs a url", "/url"
            return
        try:
            url = self._policy.check_url(address)
        except EgressRefused as error:
            yield error.code, error.message, "/url"
            return
        yield from _header_faults(config, "headers")
        yield from _header_faults(config, "secret_headers")
        yield from self._secret_faults(config, url)

    def _secret_faults(
        self, config: dict[str, Any], url: httpx.URL
    ) -> Iterator[tuple[str, str, str]]:
        secrets = config.get("secret_headers", {})
        if not isinstance(secrets, dict) or not secrets:
            return
        if url.scheme != "https" and not self._policy.allows_host(url.raw_host.decode("ascii")):
            text = "secrets are sent over https only"
            yield "secret_refused", text, "/secret_headers"
        plain = config.get("headers")
        both = {name.lower() for name in plain} if isinstance(plain, dict) else set()
        for header, name in secrets.items():
            pointer = f"/secret_headers/{header}"
            if header.lower() in both:
                yield "config_invalid", f"header {header!r} is given twice", pointer
            try:
                self._secrets.value_for(str(name), url)
            except SecretRefused as error:
                yield "secret_refused", str(error), pointer


def _header_faults(config: dict[str, Any], part: str) -> Iterator[tuple[str, str, str]]:
    headers = config.get(part, {})
    if not isinstance(headers, dict) or len(headers) > HEADERS_MAX:
        text = f"{part} must be an object of at most {HEADERS_MAX} names"
        yield "config_invalid", text, f"/{part}"
        return
    for name, value in headers.items():
        pointer = f"/{part}/{name}"
        if not _HEADER_NAME.match(name) or name.lower() in _OWN_HEADERS:
            yield "config_invalid", f"header {name!r} can not be set", pointer
        elif not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            yield "config_invalid", f"header {name!r} needs a printable ASCII text", pointer


def _request(call: Call, target: _Target, progress: SendProgress) -> httpx.Request:
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
    detail = plain_line(redacted(detail_of(body), secrets))
    return status_failure(response, detail)


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
