"""One provider's HTTP: a pooled transport of its own, and what every outcome of a request means.

The transport is httpx's, used without its client: no cookies are kept, no redirects followed, no
proxy or certificate taken from the environment, and no address logged. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

import httpx
import orjson

from app.adapters.providers.endpoint import Endpoint
from app.adapters.providers.failures import (
    BrokenOff,
    Garbage,
    error_word,
    failure,
    is_echo,
    status_failure,
)
from app.adapters.providers.framing import EventStream, Framing, JsonLines
from app.domain.chat import ChatAnswer, LlmUnavailableError
from app.version import VERSION

ANSWER_BYTES_MAX = 8 * 1024 * 1024
CONNECT_TIMEOUT_S = 10.0
# How long to wait for the words of an error, and for the end of a body whose end mark has come.
ERROR_BODY_S = 2.0
DRAIN_S = 0.1
ERROR_BODY_BYTES_MAX = 16_384
LIMITS = httpx.Limits(max_connections=512, max_keepalive_connections=32, keepalive_expiry=15.0)

JSON = "application/json"
EVENT_STREAM = "text/event-stream"
JSON_LINES = "application/x-ndjson"
_FRAMINGS: dict[str, Callable[[], Framing]] = {EVENT_STREAM: EventStream, JSON_LINES: JsonLines}

Found = TypeVar("Found")


class AnswerStream(Protocol):
    """Puts a streamed answer together; both methods raise `Garbage`, `take` `BrokenOff` as well."""

    def take(self, payload: bytes) -> bool:
        """One step of the answer; True for the vendor's end mark."""
        ...

    def answer(self) -> ChatAnswer:
        """The whole, after the end mark."""
        ...


@functools.cache
def _tls() -> ssl.SSLContext:
    """Reading the certificates takes a while, and all providers trust the same."""
    return httpx.create_ssl_context(trust_env=False)


class Exchange:
    """Asks one provider. Cancelling a request closes its connection.

    Every request raises `TimeoutError` and `LlmUnavailableError` as `failures` tells.
    """

    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str]) -> None:
        self._name = endpoint.name
        self._base_url = endpoint.base_url.rstrip("/")
        self._headers = httpx.Headers(
            {"User-Agent": f"flexrun/{VERSION}", "Accept-Encoding": "identity", **headers}
        )
        self._headers.update(endpoint.headers)
        self._transport = httpx.AsyncHTTPTransport(verify=_tls(), trust_env=False, limits=LIMITS)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._transport.aclose()

    async def get(self, path: str, timeout_s: float, parse: Callable[[bytes], Found]) -> Found:
        """What `parse` makes of a JSON body; it may raise `Garbage` and `BrokenOff`."""
        return await self._ask(self._request("GET", path, JSON), timeout_s, parse)

    async def post(
        self, path: str, body: dict[str, Any], timeout_s: float, parse: Callable[[bytes], Found]
    ) -> Found:
        """The same with a body to send."""
        return await self._ask(self._request("POST", path, JSON, body), timeout_s, parse)

    async def stream(
        self,
        path: str,
        body: dict[str, Any],
        timeout_s: float,
        media_type: str,
        stream: AnswerStream,
    ) -> ChatAnswer:
        """The answer of a body of this media type, which `stream` takes step by step."""
        framing = _FRAMINGS[media_type]()

        async def receive(response: httpx.Response) -> ChatAnswer:
            _check_media_type(response, media_type)
            return await _streamed(response, framing, stream)

        request = self._request("POST", path, media_type, body)
        return await self._exchange(request, timeout_s, receive)

    async def _ask(
        self, request: httpx.Request, timeout_s: float, parse: Callable[[bytes], Found]
    ) -> Found:
        async def receive(response: httpx.Response) -> Found:
            _check_media_type(response, JSON)
            return parse(b"".join([piece async for piece in _pieces(response)]))

        return await self._exchange(request, timeout_s, receive)

    def _request(
        self, method: str, path: str, media_type: str, body: dict[str, Any] | None = None
    ) -> httpx.Request:
        headers = httpx.Headers({"Accept": media_type})
        if body is not None:
            headers["Content-Type"] = JSON
        headers.update(self._headers)
        return httpx.Request(
            method,
            self._base_url + path,
            headers=headers,
            content=None if body is None else self._encoded(body),
            extensions={"timeout": {"connect": CONNECT_TIMEOUT_S}},
        )

    def _encoded(self, body: dict[str, Any]) -> bytes:
        try:
            return orjson.dumps(body)
        except orjson.JSONEncodeError:
            text = f"{self._name}: the request can not be written as JSON"
        raise LlmUnavailableError("provider_refused", text, retryable=False, target_failed=False)

    async def _exchange(
        self,
        request: httpx.Request,
        timeout_s: float,
        receive: Callable[[httpx.Response], Awaitable[Found]],
    ) -> Found:
        known: LlmUnavailableError | None = None
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._open(request)
                async with contextlib.aclosing(response):
                    if response.is_success:
                        return await receive(response)
                    # Known from here on, even if the body with the vendor's word never comes.
                    known = self._status_failure(response, "")
                    word = await _error_word(response)
                    shown = "" if is_echo(word, request) else word
                    raise self._status_failure(response, shown)
        except (TimeoutError, httpx.HTTPError, Garbage, BrokenOff) as error:
            failed = known or failure(self._name, error, request)
        # Raised out here it does not hold on to that error: those of libraries have the request
        # with its key, and can quote what came back.
        raise failed

    async def _open(self, request: httpx.Request) -> httpx.Response:
        try:
            return await self._transport.handle_async_request(request)
        except AttributeError:
            # anyio has no word for a connection that was reset as soon as it stood.
            raise httpx.ConnectError("the connection was reset at once") from None

    def _status_failure(self, response: httpx.Response, word: str) -> LlmUnavailableError:
        wish = response.headers.get("retry-after", "")
        return status_failure(self._name, response.status_code, wish, word)


def _check_media_type(response: httpx.Response, wanted: str) -> None:
    """A server that names no media type is believed: what it sends has to prove itself."""
    named = response.headers.get("content-type", "").split(";")[0].strip().lower()
    if named not in ("", wanted):
        raise Garbage(f"is not {wanted}")
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Garbage("is compressed, which was not asked for")


async def _pieces(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The body as it arrives; raises `Garbage` beyond `ANSWER_BYTES_MAX`."""
    left = ANSWER_BYTES_MAX
    async for piece in response.aiter_raw():
        left -= len(piece)
        if left < 0:
            raise Garbage(f"is larger than {ANSWER_BYTES_MAX} bytes")
        yield piece


async def _streamed(response: httpx.Response, framing: Framing, stream: AnswerStream) -> ChatAnswer:
    async with contextlib.aclosing(_pieces(response)) as pieces:
        async for piece in pieces:
            if any(stream.take(payload) for payload in framing.feed(piece)):
                await _drain(pieces)
                return stream.answer()
    is_whole = False
    with contextlib.suppress(Garbage):  # half a payload: it was cut off, too
        is_whole = any(stream.take(payload) for payload in framing.end())
    if is_whole:
        return stream.answer()
    # Also where HTTP ended in good order: the connection was lost behind the vendor's front door.
    raise httpx.RemoteProtocolError("the stream ended before its end mark")


async def _drain(pieces: AsyncGenerator[bytes, None]) -> None:
    """Read the rest, which is nearly nothing: a body read to its end leaves the connection open."""
    with contextlib.suppress(TimeoutError, httpx.HTTPError, Garbage):
        async with asyncio.timeout(DRAIN_S):
            async for _ in pieces:
                pass


async def _error_word(response: httpx.Response) -> str:
    """The vendor's word for the error `{"error": …}`, if it comes soon; else ""."""
    body = b""
    with contextlib.suppress(TimeoutError, httpx.HTTPError, ValueError):
        async with asyncio.timeout(ERROR_BODY_S):
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > ERROR_BODY_BYTES_MAX:
                    return ""
        found = orjson.loads(body)
        return error_word(found.get("error")) if isinstance(found, dict) else ""
    return ""
