"""The pooled HTTP transport behind the egress guard, for httpx clients.

The guard sits below the connection pool, where names become sockets: the pool keys its connections
by name, so a connection opened for one host is never used for another, and TLS checks the
certificate of the name although the socket goes to a judged address. Proxies of the environment
play no part, since this transport is the only road out.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpcore
import httpx

from app.adapters.capabilities.egress import EgressPolicy, EgressRefused, ResolveFailed

CONNECTIONS_MAX = 512
KEEPALIVE_MAX = 128
KEEPALIVE_S = 15.0
FRESH_CONNECTION = "flexrun.fresh_connection"


@dataclass(slots=True)
class SendProgress:
    """Give it as the request's extension `trace`: `sent` turns True with the first byte that goes
    out. Until then the far side can not have acted."""

    sent: bool = False

    async def __call__(self, event: str, _info: dict[str, Any]) -> None:
        if event.endswith(".send_request_headers.started"):
            self.sent = True


class EgressTransport(httpx.AsyncBaseTransport):
    """Sends requests through the guard. Share one per process; `aclose()` it once.

    Raises what httpx raises, and `EgressRefused` for a target that the policy forbids. A request
    with the extension `FRESH_CONNECTION` set to True gets a connection of its own, so that the
    death of an idle connection can not be taken for an unknown outcome.
    """

    def __init__(self, policy: EgressPolicy, *, ssl_context: ssl.SSLContext | None = None) -> None:
        self.policy = policy
        context = ssl_context or httpx.create_ssl_context(trust_env=False)
        backend = _GuardedBackend(policy)
        self._pooled = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=CONNECTIONS_MAX,
            max_keepalive_connections=KEEPALIVE_MAX,
            keepalive_expiry=KEEPALIVE_S,
            network_backend=backend,
        )
        self._fresh = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=CONNECTIONS_MAX,
            max_keepalive_connections=0,
            network_backend=backend,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """One exchange, redirects not followed; the body is streamed."""
        self.policy.check_url(str(request.url))
        extensions = dict(request.extensions)
        pool = self._fresh if extensions.pop(FRESH_CONNECTION, False) else self._pooled
        url = request.url
        with _httpx_errors(request):
            response = await pool.handle_async_request(
                httpcore.Request(
                    method=request.method,
                    url=httpcore.URL(
                        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
                    ),
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=extensions,
                )
            )
        return httpx.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_Body(response, request),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pooled.aclose()
        await self._fresh.aclose()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self.aclose()


class _GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects by name: judge all addresses, then try them one by one."""

    def __init__(self, policy: EgressPolicy) -> None:
        self._policy = policy
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            addresses = await self._policy.addresses(host, port)
        except ResolveFailed as error:
            raise httpcore.ConnectError(str(error)) from error
        last: Exception | None = None
        # One address that swallows packets must not use up the time of the others.
        share = None if timeout is None else timeout / len(addresses)
        for address in addresses:
            try:
                stream = await self._inner.connect_tcp(
                    address, port, share, local_address, socket_options
                )
                _check_open(stream)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
            else:
                return stream
        assert last is not None
        raise last

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise EgressRefused("scheme_refused", "tools do not reach local sockets")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


def _check_open(stream: httpcore.AsyncNetworkStream) -> None:
    """Nothing was sent yet: a connection that was reset as soon as it stood was never made.

    anyio has no word for it: what asks its stream for anything fails with an AttributeError,
    because the transport has no socket any more.
    """
    try:
        stream.get_extra_info("socket")
    except AttributeError as error:
        raise httpcore.ConnectError("the connection was reset at once") from error


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response, request: httpx.Request) -> None:
        self._response = response
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _httpx_errors(self._request):
            async for part in self._response.aiter_stream():
                yield part

    async def aclose(self) -> None:
        await self._response.aclose()


_ERRORS: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (
    (httpcore.ConnectTimeout, httpx.ConnectTimeout),
    (httpcore.ReadTimeout, httpx.ReadTimeout),
    (httpcore.WriteTimeout, httpx.WriteTimeout),
    (httpcore.PoolTimeout, httpx.PoolTimeout),
    (httpcore.ConnectError, httpx.ConnectError),
    (httpcore.ReadError, httpx.ReadError),
    (httpcore.WriteError, httpx.WriteError),
    (httpcore.LocalProtocolError, httpx.LocalProtocolError),
    (httpcore.RemoteProtocolError, httpx.RemoteProtocolError),
    (httpcore.UnsupportedProtocol, httpx.UnsupportedProtocol),
    (httpcore.NetworkError, httpx.NetworkError),
    (httpcore.ProtocolError, httpx.ProtocolError),
    (httpcore.TimeoutException, httpx.TimeoutException),
)


@contextlib.contextmanager
def _httpx_errors(request: httpx.Request) -> Iterator[None]:
    try:
        yield
    except tuple(ours for ours, _ in _ERRORS) as error:
        for ours, theirs in _ERRORS:
            if isinstance(error, ours):
                raise theirs(str(error), request=request) from error
        raise
