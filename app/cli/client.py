"""The HTTP API as commands use it: answers as JSON, everything else as an error for people.

httpx is imported on use, so that `flexrun --help` does not wait for it.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self
from urllib.parse import quote, urlsplit

import typer

from app.cli.errors import ApiProblem, CliError, ExitCode, Unreachable, UsageError
from app.cli.output import err

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
START_IT = "Start it with: flexrun serve"
READ_TIMEOUT_S = 30.0
ORDER_TRIES_MAX = 4
SILENCE_MAX_S = 45.0
"""Streams have a heartbeat every 15 s: after three that did not come, the line is dead."""

Params = Mapping[str, str | int | list[str] | None]
Url = Annotated[
    str, typer.Option("--url", envvar="FLEXRUN_URL", help="Where the service is.", metavar="URL")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class Api:
    """One connection to the service. Raises `Unreachable` and `ApiProblem`, never httpx errors."""

    def __init__(self, url: str) -> None:
        # Slow to import; only commands that speak to a service pay for it.
        import httpx  # noqa: PLC0415

        self.url = without_userinfo(url.rstrip("/"))  # for texts, which must show no password
        try:
            parts = urlsplit(url)
            is_loopback = _is_loopback(parts.hostname or "")
            has_port = (parts.port or 0) >= 0  # reading it is what checks it
        except ValueError:
            raise UsageError(f"{self.url!r} is no URL.") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or not has_port:
            raise UsageError(f"{self.url!r} is no http URL, such as {DEFAULT_URL}.")
        self._client = httpx.Client(
            base_url=url.rstrip("/"),
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=5.0),
            # A proxy of the environment knows nothing of this machine's own addresses.
            trust_env=not is_loopback,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.close()

    def get(self, path: str, params: Params | None = None) -> Any:
        """The JSON of a GET."""
        return self._json("GET", path, params=_present(params))

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Any:
        """The JSON that answers a POST of `body`."""
        return self._json("POST", path, json=body, headers=dict(headers or {}))

    def probe(self, path: str) -> dict[str, Any]:
        """The JSON of a probe, which answers 503 to say no."""
        with self._translated():
            response = self._client.get(path)
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict) or "status" not in found:
            raise self._stranger(response)
        return found

    def _json(self, method: str, path: str, **more: Any) -> Any:
        with self._translated():
            response = self._client.request(method, path, **more)
        self._check(response)
        try:
            return response.json()
        except ValueError:
            raise self._stranger(response) from None

    @contextmanager
    def stream(
        self, path: str, params: Params, headers: Mapping[str, str]
    ) -> Iterator[Iterator[bytes] | None]:
        """The bytes of an event stream as they come; None when nothing is left to come (204)."""
        import httpx  # noqa: PLC0415 - see above

        timeout = httpx.Timeout(SILENCE_MAX_S, connect=5.0)
        accept = {"Accept": "text/event-stream", **headers}
        with (
            self._translated(),
            self._client.stream(
                "GET", path, params=_present(params), headers=accept, timeout=timeout
            ) as response,
        ):
            if response.status_code == 204:
                yield None
                return
            if response.status_code >= 400:
                response.read()
            self._check(response)
            if "text/event-stream" not in response.headers.get("content-type", ""):
                raise self._stranger(response)
            yield response.iter_bytes()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        import httpx  # noqa: PLC0415 - see above

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise Unreachable(
                f"Flexrun does not answer at {self.url}.", refused=True, hint=START_IT
            ) from None
        except httpx.TransportError as error:
            raise Unreachable(
                f"The connection to {self.url} broke ({type(error).__name__})."
            ) from None
        except httpx.InvalidURL:
            raise UsageError(f"{self.url!r} is no http URL, such as {DEFAULT_URL}.") from None

    def _check(self, response: httpx.Response) -> None:
        if response.status_code < 300:
            return
        if response.headers.get("content-type", "").startswith("application/problem+json"):
            body = response.json()
            retry_after_s = _seconds(response.headers.get("retry-after", ""))
            raise ApiProblem(response.status_code, body, retry_after_s)
        if response.status_code in (502, 503, 504):
            raise Unreachable(
                f"Flexrun is not there behind {self.url} (HTTP {response.status_code}).",
                hint=START_IT,
            )
        raise self._stranger(response)

    def _stranger(self, response: httpx.Response) -> CliError:
        return CliError(
            f"{self.url} answers HTTP {response.status_code}, but not as Flexrun does.",
            exit_code=ExitCode.UNREACHABLE,
            hint="Is --url (or FLEXRUN_URL) the address of a Flexrun service?",
        )


def without_userinfo(url: str) -> str:
    """The address without `user:password@`, also when it is not well formed."""
    return re.sub(r"^(\w+://)?.*@", lambda found: found[1] or "", url, flags=re.DOTALL)


def path_of(*segments: str) -> str:
    """`/v1/…` of segments that callers typed."""
    return "/v1/" + "/".join(quote(segment, safe="") for segment in segments)


def _present(params: Params | None) -> dict[str, Any]:
    return {name: value for name, value in (params or {}).items() if value not in (None, [])}


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() else 1.0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def pages(api: Api, path: str, key: str, params: Params, *, limit: int) -> list[dict[str, Any]]:
    """At most `limit` items of a cursor-paged list."""
    found: list[dict[str, Any]] = []
    cursor: str | None = None
    while len(found) < limit:
        size = min(limit - len(found), 200)
        page = api.get(path, {**params, "limit": size, "cursor": cursor})
        found += page[key]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    return found


def order(api: Api, path: str, body: Any, key: str | None = None) -> dict[str, Any]:
    """POST an order once, however often it takes: under one idempotency key it acts only once."""
    key = key or str(uuid.uuid4())
    tries = 1
    may_have_acted = False
    while True:
        try:
            accepted: dict[str, Any] = api.post(path, body, {"Idempotency-Key": key})
            return accepted
        except (Unreachable, ApiProblem) as error:
            pause_s = _worth_another_try(error)
            may_have_acted = may_have_acted or _may_have_acted(error)
            if pause_s is None or tries == ORDER_TRIES_MAX:
                if may_have_acted and error.exit_code == ExitCode.UNREACHABLE:
                    # We may have made the key, and without it the order might act twice.
                    error.hint = f"Send it again with: --idempotency-key {shlex.quote(key)}"
                raise
            err(f"{error.message} Sending it again in {pause_s:.0f} s.")
        tries += 1
        time.sleep(pause_s)


def _worth_another_try(error: Unreachable | ApiProblem) -> float | None:
    if isinstance(error, ApiProblem):
        return error.retry_after_s if error.status == 503 else None
    return None if error.refused else 1.0


def _may_have_acted(error: Unreachable | ApiProblem) -> bool:
    if isinstance(error, ApiProblem):
        return error.code == "submit_outcome_unknown"
    return not error.refused
