"""The egress guard: no spelling of a private place is reached, and public ones are.

A canary listens where it must never be heard; every attempt to connect is recorded besides, so that
addresses of other machines count too.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Iterator

import httpcore
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.adapters.capabilities.egress import (
    EgressPolicy,
    EgressRefused,
    ResolveFailed,
    is_public,
    resolve,
)
from app.adapters.capabilities.egress_transport import EgressTransport

PRIVATE = [
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "169.254.169.254",
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:7f00:1",
    "::ffff:169.254.169.254",
    "::ffff:0:127.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "2002:808:808::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
]
PUBLIC = ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1", "64:ff9b::8.8.8.8"]

HOSTS = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "127.0.0.1.",
    "2130706433",
    "017700000001",
    "0x7f000001",
    "0x7f.0x0.0x0.0x1",
    "0x7f.1",
    "0177.0.0.1",
    "0177.0.0.01",
    "00000177.0.0.1",
    "127.0x0.0.1",
    "127.0.0.0x1",
    "0",
    "0.0.0.0",
    "0x0",
    "00",
    "3232235777",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "169.254.43518",
    "169.16689662",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "LocalHost.",
    "ip6-localhost",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[0000:0000:0000:0000:0000:0000:0000:0001]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:7f00:0001]",
    "[0:0:0:0:0:ffff:127.0.0.1]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "[fe80::1]",
    "[fe80::1%25lo]",
    "[::1%25lo]",
    "[::1%lo]",
    "[fd00:ec2::254]",
    "\uff11\uff12\uff17.\uff10.\uff10.\uff11",
    "127\u30020\u30020\u30021",
    "127\uff0e0\uff0e0\uff0e1",
    "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460",
    "\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3",
    "loc\u00adalhost",
    "localhost\u200b",
    "%6c%6f%63%61%6c%68%6f%73%74",
    "127.0.0.1%00",
    "127.0.0.1%2eexample.org",
    "127.0.0.1\\@example.org",
    "example.org@127.0.0.1",
    "user:pass@127.0.0.1",
    "example.org:80@127.0.0.1",
    "@127.0.0.1",
    "127.0.0.1#@example.org",
    "127.0.0.1?@example.org",
    "127.0.0.1;example.org",
    "127.0.0.1,example.org",
    "[127.0.0.1]",
    "[localhost]",
    "127..0.0.1",
    ".127.0.0.1",
    "127.0.0.1..",
    "-127.0.0.1",
    "+127.0.0.1",
    "1e2.0.0.1",
    "127.0.0.256",
    "127.0.0.1.1",
    "4294967296",
    "018.0.0.1",
    "0x",
    "0x7f000001.",
    "xn--127-0-0-1",
    "a" * 300,
    "a." * 150,
]
WHOLE = [
    "//127.0.0.1/",
    "127.0.0.1",
    "http:127.0.0.1",
    "http:/127.0.0.1",
    "http:///127.0.0.1",
    "http:\\\\127.0.0.1\\",
    "http://\t127.0.0.1/",
    "http://127.0.0.1\r\nHost: x/",
    " http://127.0.0.1/",
    "file:///etc/passwd",
    "file://127.0.0.1/etc/passwd",
    "gopher://127.0.0.1:6379/_x",
    "dict://127.0.0.1:11211/",
    "ftp://127.0.0.1/",
    "ws://127.0.0.1/",
    "unix:/var/run/docker.sock",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock/",
    "jar:http://127.0.0.1!/",
    "data:text/plain,x",
    "javascript:alert(1)",
    "http://127.0.0.1:0/",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:-1/",
    "http://127.0.0.1:22/",
    "http://example.org:6379/",
    "http://example.org:22/",
    "",
    "http://",
    "http://:80/",
    "http://./",
    "http://[/",
    "http://]/",
    "http://[]/",
    "http://example.org/" + "a" * 5_000,
]


class Attempts(httpcore.AsyncNetworkBackend):
    """In place of the network: notes where a connection would have gone."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int]] = []

    async def connect_tcp(self, host: str, port: int, *_: object, **__: object) -> None:  # type: ignore[override]
        self.made.append((host, port))
        raise httpcore.ConnectError("nobody there")


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    made = Attempts()
    monkeypatch.setattr(httpcore, "AnyIOBackend", lambda: made)
    return made


@pytest.fixture
async def canary() -> AsyncIterator[list[tuple[str, int]]]:
    """Real listeners on loopback; the list starts with their places, then come the visitors."""
    heard: list[tuple[str, int]] = []

    def visited(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(writer.get_extra_info("peername")[:2])
        writer.close()

    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            await asyncio.start_server(visited, "127.0.0.1", 0)
        )
        port = server.sockets[0].getsockname()[1]
        if socket.has_ipv6:
            with contextlib.suppress(OSError):
                await stack.enter_async_context(await asyncio.start_server(visited, "::1", port))
        heard.append(("port", port))
        yield heard


async def ask(policy: EgressPolicy, url: str) -> httpx.Response:
    transport = EgressTransport(policy)
    try:
        response = await transport.handle_async_request(httpx.Request("GET", url))
        await response.aclose()
        return response
    finally:
        await transport.aclose()


async def reaches(url: str) -> bool:
    """Whether a request for the URL makes it to the connecting of a socket."""
    policy = EgressPolicy()
    try:
        policy.check_url(url)
        await ask(policy, url)
    except (EgressRefused, httpx.InvalidURL, httpx.HTTPError):
        return False
    return True


def with_port(host: str, port: int) -> Iterator[str]:
    for scheme in ("http", "https"):
        yield f"{scheme}://{host}:{port}/x"


async def test_no_spelling_reaches_a_canary(canary: list[tuple[str, int]]) -> None:
    port = canary[0][1]
    urls = [url for host in HOSTS for url in with_port(host, port)] + WHOLE
    urls += [f"http://{host}/" for host in HOSTS]
    assert len(urls) >= 200
    assert [url for url in urls if await reaches(url)] == []
    assert canary[1:] == []


async def test_no_spelling_makes_an_attempt_at_a_private_address(attempts: Attempts) -> None:
    for host in HOSTS + [f"[{text}]" if ":" in text else text for text in PRIVATE]:
        for url in (*with_port(host, 8080), f"http://{host}/"):
            await reaches(url)
    assert [place for place in attempts.made if not is_public(ipaddress.ip_address(place[0]))] == []


@pytest.mark.parametrize("text", PRIVATE)
async def test_private_addresses_are_refused(text: str, attempts: Attempts) -> None:
    assert not is_public(ipaddress.ip_address(text))

    async def private(_host: str, _port: int) -> list[str]:
        return [text]

    with pytest.raises(EgressRefused) as caught:
        await ask(EgressPolicy(resolver=private), "https://example.org/")
    assert caught.value.code == "address_refused"
    assert text not in caught.value.message
    assert attempts.made == []


@pytest.mark.parametrize("text", PUBLIC)
async def test_public_addresses_are_connected_to(text: str, attempts: Attempts) -> None:
    async def public(_host: str, _port: int) -> list[str]:
        return [text]

    with pytest.raises(httpx.ConnectError):
        await ask(EgressPolicy(resolver=public), "https://example.org/")
    assert attempts.made == [(text, 443)]


async def test_one_private_address_among_public_ones_refuses_them_all(attempts: Attempts) -> None:
    async def mixed(_host: str, _port: int) -> list[str]:
        return ["8.8.8.8", "10.0.0.1"]

    with pytest.raises(EgressRefused):
        await ask(EgressPolicy(resolver=mixed), "http://example.org/")
    assert attempts.made == []


async def test_all_addresses_are_tried_in_order(attempts: Attempts) -> None:
    async def two(_host: str, _port: int) -> list[str]:
        return ["8.8.8.8", "8.8.4.4"]

    with pytest.raises(httpx.ConnectError):
        await ask(EgressPolicy(resolver=two), "http://example.org:8080/")
    assert attempts.made == [("8.8.8.8", 8080), ("8.8.4.4", 8080)]


async def test_rebinding_gains_nothing(attempts: Attempts) -> None:
    """A name that answers in turn: each connection resolves once and goes where it was judged."""
    answers: list[str] = []

    async def turning(_host: str, _port: int) -> list[str]:
        answers.append("8.8.8.8" if len(answers) % 2 == 0 else "127.0.0.1")
        return [answers[-1]]

    policy = EgressPolicy(resolver=turning)
    for count in range(1, 21):
        with pytest.raises((httpx.ConnectError, EgressRefused)):
            await ask(policy, "http://rebind.example.org/")
        assert len(answers) == count
    assert attempts.made == [("8.8.8.8", 80)] * 10


async def test_a_name_without_addresses_is_no_connection(attempts: Attempts) -> None:
    async def nothing(host: str, _port: int) -> list[str]:
        if host == "empty.example.org":
            return []
        raise ResolveFailed("no such host")

    policy = EgressPolicy(resolver=nothing)
    for host in ("empty.example.org", "missing.example.org"):
        with pytest.raises(httpx.ConnectError):
            await ask(policy, f"http://{host}/")
    assert attempts.made == []


@pytest.mark.parametrize(
    ("allow", "host"),
    [
        ("127.0.0.0/8", "127.0.0.1"),
        ("127.0.0.1", "localhost"),
        ("localhost", "localhost"),
        ("LocalHost.", "LOCALHOST."),
        ("127.0.0.0/8", "[::ffff:127.0.0.1]"),
    ],
)
async def test_the_operator_can_allow(
    allow: str, host: str, canary: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Environment proxies play no part either.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")

    async def v4_only(name: str, port: int) -> list[str]:
        return [text for text in await resolve(name, port) if ":" not in text]

    policy = EgressPolicy([allow], resolver=v4_only)
    with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
        await ask(policy, f"http://{host}:{canary[0][1]}/")
    assert len(canary) == 2


@pytest.mark.parametrize(
    ("allow", "host", "is_allowed"),
    [
        (".svc.local", "a.svc.local", True),
        (".svc.local", "svc.local", False),
        (".svc.local", "evilsvc.local", False),
        ("tools.internal", "tools.internal.", True),
        ("tools.internal", "a.tools.internal", False),
        ("fd00::/8", "fd00::1", True),
        ("10.1.2.3", "10.1.2.4", False),
    ],
)
def test_what_an_entry_allows(allow: str, host: str, is_allowed: bool) -> None:
    assert EgressPolicy([allow]).allows_host(host) is is_allowed


@pytest.mark.parametrize("entry", ["http://a", "10.0.0.0/33", "a b", "*", "127.1", "a/24"])
def test_a_wrong_entry_is_an_error_at_the_start(entry: str) -> None:
    with pytest.raises(ValueError, match="egress allow"):
        EgressPolicy([entry])


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("ftp://example.org/", "scheme_refused"),
        ("https://me@example.org/", "userinfo_refused"),
        ("https://example.org:25/", "port_refused"),
        ("http://2130706433/", "host_invalid"),
        ("http://exa mple.org/", "url_invalid"),
        ("http://127.0.0.1/", "address_refused"),
    ],
)
def test_reasons(url: str, code: str) -> None:
    with pytest.raises(EgressRefused) as caught:
        EgressPolicy().check_url(url)
    assert caught.value.code == code
    assert code in EgressRefused.CODES


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a?b=c#d",
        "http://example.org:8080",
        "https://b\u00fccher.example/",
        "https://xn--bcher-kva.example/",
        "https://8.8.8.8/",
        "https://[2606:4700::1]:8443/",
        "https://my_service.example.org/",
        "https://example.org./",
    ],
)
def test_ordinary_urls_pass(url: str) -> None:
    assert EgressPolicy().check_url(url).scheme in ("http", "https")


@given(st.integers(0, 2**32 - 1))
def test_ipv4_agrees_with_the_registry_of_python(number: int) -> None:
    address = ipaddress.IPv4Address(number)
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast
    for carrier in ("::ffff:0:0", "64:ff9b::"):
        carried = ipaddress.IPv6Address(int(ipaddress.IPv6Address(carrier)) + number)
        assert is_public(carried) == is_public(address)


@given(st.integers(0, 2**128 - 1))
def test_ipv6_is_closed_outside_global_unicast(number: int) -> None:
    address = ipaddress.IPv6Address(number)
    if is_public(address) and address not in ipaddress.ip_network("::/3"):
        assert address.is_global
        assert address in ipaddress.ip_network("2000::/3")


@given(st.text(max_size=60))
def test_any_text_is_judged_without_another_error(text: str) -> None:
    for url in (text, f"http://{text}", f"http://{text}/"):
        with contextlib.suppress(EgressRefused):
            EgressPolicy().check_url(url)
