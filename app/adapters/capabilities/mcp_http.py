"""Streamable HTTP: one POST a request, answered with JSON or with a stream of events.

Over the guarded transport, like every request of a tool. Source: MCP 2026-07-28 "Streamable HTTP"
(no sessions; closing the stream cancels), and 2025-11-25 for servers with sessions. Of these the
GET stream and the redelivery of lost events are not used: a cut stream is a lost connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import orjson

from app.adapters.capabilities.egress import EgressRefused
from app.adapters.capabilities.egress_transport import (
    FRESH_CONNECTION,
    EgressTransport,
    SendProgress,
)
from app.adapters.capabilities.http import CONNECT_TIMEOUT_S, DETAIL_TIMEOUT_S
from app.adapters.capabilities.http_body import BodyRefused, read_body, read_prefix
from app.adapters.capabilities.http_outcome import (
    DETAIL_BYTES_MAX,
    broken_off,
    connection_lost,
    detail_of,
    plain_line,
    refused_target,
    status_failure,
)
from app.adapters.capabilities.http_target import Target, is_own_header
from app.adapters.capabilities.mcp_params import header_value
from app.adapters.capabilities.mcp_protocol import (
    MODERN,
    TOOLS_CHANGED,
    Garbled,
    Request,
    RpcRefused,
    SessionLost,
    is_answer_to,
    notification,
    refusal_in,
    result_of,
)
from app.adapters.capabilities.secrets import redacted
from app.kit.json_gate import JsonRefused, parse_json

CLOSE_TIMEOUT_S = 2.0

_SESSION_HEADER = "Mcp-Session-Id"
_SESSION_ID = re.compile(r"[\x21-\x7e]{1,1000}")
_EVENT_STREAM = "text/event-stream"
# With one of these a server of an older revision turns away what it does not know.
_UNKNOWN_HERE = (400, 404, 405)


def is_mcp_header(name: str) -> bool:
    """Whether a header, in lower case, is set by this transport."""
    return is_own_header(name) or name.startswith("mcp-") or name == "last-event-id"


class HttpChannel:
    """The requests to one URL with one set of headers. `bytes_max` bounds each message."""

    def __init__(self, transport: EgressTransport, target: Target, bytes_max: int) -> None:
        self.on_tools_changed: Callable[[], None] = _ignore
        self._transport = transport
        self._target = target
        self._bytes_max = bytes_max
        self._ids = itertools.count(1)
        self._session_id = ""

    async def request(self, request: Request) -> dict[str, Any]:
        """See `Channel.request`. Cancelling it closes the connection, which ends the request."""
        message_id = next(self._ids)
        # Both begin anew, also where the server has forgotten an earlier session.
        session_id = "" if request.method in ("server/discover", "initialize") else self._session_id
        headers = {**_headers_of(request), **_session_header(session_id)}
        with _failures(request.progress):
            response = await self._post(request.message(message_id), headers, request)
            async with contextlib.aclosing(response):
                if not response.is_success:
                    raise await self._failure(response, session_id)
                message = await self._answer(response, message_id)
        result = result_of(message)
        if request.method == "initialize":
            self._keep_session(response)
        return result

    async def notify(self, method: str, version: str) -> None:
        """See `Channel.notify`."""
        request = Request(method, {}, version)
        headers = {**_headers_of(request), **_session_header(self._session_id)}
        with _failures(request.progress):
            response = await self._post(notification(method), headers, request)
            async with contextlib.aclosing(response):
                if not response.is_success:
                    raise await self._failure(response, self._session_id)

    async def aclose(self) -> None:
        """Tell a server that keeps a session that it is over; the transport is not ours."""
        if not self._session_id:
            return
        headers = {**self._target.headers, **_session_header(self._session_id)}
        self._session_id = ""
        with contextlib.suppress(httpx.HTTPError, EgressRefused, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                request = httpx.Request("DELETE", self._url, headers=headers)
                await (await self._transport.handle_async_request(request)).aclose()

    @property
    def _url(self) -> httpx.URL:
        return self._target.url.copy_with(fragment=None)

    async def _post(
        self, message: dict[str, Any], headers: dict[str, str], request: Request
    ) -> httpx.Response:
        sent = httpx.Request(
            "POST",
            self._url,
            headers={
                **self._target.headers,
                **headers,
                "Accept": f"application/json, {_EVENT_STREAM}",
                "Accept-Encoding": "identity",
                "Content-Type": "application/json",
            },
            content=orjson.dumps(message),
            extensions={
                "timeout": {"connect": CONNECT_TIMEOUT_S},
                "trace": request.progress,
                FRESH_CONNECTION: request.fresh,
            },
        )
        return await self._transport.handle_async_request(sent)

    async def _answer(self, response: httpx.Response, message_id: int) -> dict[str, Any]:
        media_type = response.headers.get("content-type", "").split(";")[0].strip().lower()
        if media_type == _EVENT_STREAM:
            return await self._streamed_answer(response, message_id)
        if media_type not in ("application/json", ""):
            raise Garbled("is neither JSON nor a stream of events")
        message = self._parsed(await read_body(response, self._bytes_max))
        if not is_answer_to(message, message_id):
            raise Garbled("does not belong to the request")
        return dict(message)

    async def _streamed_answer(self, response: httpx.Response, message_id: int) -> dict[str, Any]:
        if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise Garbled("is an encoded stream of events")
        async with contextlib.aclosing(event_data(response.aiter_raw(), self._bytes_max)) as events:
            async for data in events:
                message = self._parsed(data)
                if is_answer_to(message, message_id):
                    return dict(message)
                if isinstance(message, dict) and message.get("method") == TOOLS_CHANGED:
                    self.on_tools_changed()
        raise connection_lost()

    def _parsed(self, body: bytes) -> Any:
        """The message in a body, without our secrets, should the server repeat them."""
        try:
            return redacted(parse_json(body), self._target.secrets)
        except JsonRefused as error:
            raise Garbled(f"is not strict JSON: {error.detail}") from error

    async def _failure(self, response: httpx.Response, session_id: str) -> Exception:
        """What a status outside 2xx means, with the reason in its body if that arrives soon."""
        body = b""
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(DETAIL_TIMEOUT_S):
                body = await read_prefix(response, DETAIL_BYTES_MAX)
        status = response.status_code
        if status == 404 and session_id:
            return SessionLost(None, "the session is gone")
        refusal = None
        with contextlib.suppress(JsonRefused):
            refusal = refusal_in(redacted(parse_json(body), self._target.secrets))
        is_refusal = 400 <= status < 500 and status not in (401, 403, 408, 429)
        if is_refusal and refusal is not None:
            return refusal
        detail = detail_of(body, self._target.secrets)
        if refusal is not None:
            detail = plain_line(refusal.message)
        if status in _UNKNOWN_HERE:
            return RpcRefused(None, f"answered {status}" + (f": {detail}" if detail else ""))
        return status_failure(response, detail)

    def _keep_session(self, response: httpx.Response) -> None:
        found = response.headers.get(_SESSION_HEADER, "")
        if found and not _SESSION_ID.fullmatch(found):
            raise Garbled("has an unusable session id")
        self._session_id = found


async def event_data(parts: AsyncIterator[bytes], bytes_max: int) -> AsyncGenerator[bytes]:
    """The data of each event of a stream that has some, for events without a name or `message`.

    Lines end with LF, CRLF or CR, as the HTML standard has it. Raises `Garbled` for an event or a
    line of more than `bytes_max` bytes.
    """
    data: list[bytes] = []
    size, is_named = 0, False
    async for line in _lines(parts, bytes_max):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
            size += len(value)
        elif field == b"event":
            is_named = value not in (b"", b"message")
        elif not line:
            if size and not is_named:
                yield b"\n".join(data)
            data, size, is_named = [], 0, False
        if size > bytes_max:
            raise Garbled(f"has an event of more than {bytes_max} bytes")


async def _lines(parts: AsyncIterator[bytes], bytes_max: int) -> AsyncIterator[bytes]:
    """The finished lines of a stream, without their ends."""
    rest: list[bytes] = []
    size, after_cr = 0, False
    async for part in parts:
        # A CRLF that came in two parts ends one line, not two.
        text = part.removeprefix(b"\n") if after_cr else part
        after_cr = part.endswith(b"\r") if part else after_cr
        if b"\n" not in text and b"\r" not in text:
            # Joined only when a line is finished, or a dripping server would keep us busy.
            rest.append(text)
            size += len(text)
        else:
            found = b"".join((*rest, text)).splitlines(keepends=True)
            rest = [found.pop()] if not found[-1].endswith((b"\n", b"\r")) else []
            size = len(rest[0]) if rest else 0
            for line in found:
                yield line.rstrip(b"\r\n")
        if size > bytes_max:
            raise Garbled(f"has a line of more than {bytes_max} bytes")


def _headers_of(request: Request) -> dict[str, str]:
    """What a request repeats of its body, or says of its revision, in headers."""
    headers = {"MCP-Protocol-Version": request.version} if request.version else {}
    if request.version == MODERN:
        headers["Mcp-Method"] = request.method
        if request.name is not None:
            headers["Mcp-Name"] = header_value(request.name)
        headers |= request.mirrored
    return headers


def _session_header(session_id: str) -> dict[str, str]:
    return {_SESSION_HEADER: session_id} if session_id else {}


@contextlib.contextmanager
def _failures(progress: SendProgress) -> Iterator[None]:
    try:
        yield
    except EgressRefused as error:
        raise refused_target(error) from error
    except httpx.HTTPError as error:
        raise broken_off(error, sent=progress.sent) from error
    except BodyRefused as error:
        raise Garbled(f"can not be read: {error}") from error


def _ignore() -> None:
    """Until a session wants to know."""
