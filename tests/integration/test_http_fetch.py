"""The builtin `http.fetch` against a real server: media types, charsets, redirects, limits."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.adapters.capabilities.builtin import BuiltinAdapter, Pack
from app.adapters.capabilities.egress import EgressPolicy
from app.adapters.capabilities.egress_transport import EgressTransport
from app.adapters.capabilities.html_text import html_to_markdown
from app.adapters.capabilities.pack_fetch import fetch_pack
from app.ports import CallFailed
from tests.capability_samples import call_of, compiled
from tests.far_side import Behaviour, Exchange, FarSide, answer, far_side, raw

LIMIT = 100_000
HTML = b"""<!doctype html><html><head><title> The  page &amp; more </title>
<meta charset="utf-8"><style>p { color: red }</style><script>evil()</script></head>
<body><nav><a href="/">Home</a></nav>
<main><h1>Head <em>line</em></h1><p>First <b>bold</b> words with
<a href="https://example.org/x">a link</a> and <a href="/rel">another</a>, caf\xc3\xa9.</p>
<ul><li>one<li>two</ul><ol><li>a</li><li>b</li></ol>
<pre><code>x = 1
y = 2</code></pre><table><tr><th>A</th><th>B</th></tr><tr><td>1</td><td>2</td></tr></table>
<p># not a heading</p><p hidden>unseen</p></main><footer>Imprint</footer></body></html>"""


@pytest.fixture
async def side() -> AsyncIterator[FarSide]:
    async with far_side() as running:
        yield running


@pytest.fixture
async def pack() -> AsyncIterator[Pack]:
    transport = EgressTransport(EgressPolicy(["127.0.0.1"]))
    yield fetch_pack(transport, page_bytes_max=LIMIT)
    await transport.aclose()


async def fetch(pack: Pack, url: str, deadline_ms: int = 10_000) -> dict[str, Any]:
    capability = compiled(pack.registrations()[0], pack.facets())
    assert capability.input.violations({"url": url}) == []
    call = call_of(capability, {"url": url}, deadline_ms)
    output = await BuiltinAdapter([pack]).invoke(call)
    assert capability.output.violations(output) == []
    document: dict[str, Any] = output["document"]
    return document


async def failure(pack: Pack, side: FarSide, behave: Behaviour, **more: Any) -> CallFailed:
    side.behave = behave
    with pytest.raises(CallFailed) as caught:
        await fetch(pack, side.url, **more)
    return caught.value


async def test_html_becomes_markdown(pack: Pack, side: FarSide) -> None:
    side.behave = answer(200, HTML, "text/html")
    document = await fetch(pack, side.url + "#part")
    assert document == {
        "title": "The page & more",
        "media_type": "text/markdown",
        "source": side.url,
        "text": (
            "# Head line\n\nFirst bold words with [a link](https://example.org/x) and another,"
            " caf\u00e9.\n\n- one\n\n- two\n\n1. a\n\n2. b\n\n```\nx = 1\ny = 2\n```\n\nA B\n\n"
            "1 2\n\n\\# not a heading"
        ),
    }
    (exchange,) = side.exchanges
    assert exchange.method == "GET"
    assert set(exchange.headers) == {"host", "accept", "accept-encoding", "user-agent"}


@pytest.mark.parametrize(
    ("body", "content_type", "text", "media_type"),
    [
        (b"# Hi\n", "text/markdown; charset=utf-8", "# Hi\n", "text/markdown"),
        (b"plain", "text/plain", "plain", "text/plain"),
        (b"plain", None, "plain", "text/plain"),
        (b'{"a": 1}', "application/json", '{"a": 1}', "application/json"),
        (b'{"a": 1}', "application/ld+json", '{"a": 1}', "application/json"),
        (b"a,b", "text/csv", "a,b", "text/plain"),
        (
            "caf\u00e9".encode("latin-1"),
            "text/plain; charset=ISO-8859-1",
            "caf\u00e9",
            "text/plain",
        ),
        ("caf\u00e9".encode("cp1252"), "text/plain", "caf\u00e9", "text/plain"),
        ("caf\u00e9".encode("utf-8-sig"), "text/plain; charset=latin-1", "caf\u00e9", "text/plain"),
        ("caf\u00e9".encode("utf-16"), "text/plain", "caf\u00e9", "text/plain"),
        (b"caf\xc3\xa9", "text/plain; charset=no-such", "caf\u00e9", "text/plain"),
        (b"caf\xc3\xa9", "text/plain; charset=base64", "caf\u00e9", "text/plain"),
        (b"a\x00b\x1bc", "text/plain", "a\ufffdb\ufffdc", "text/plain"),
        (
            b'<meta charset="iso-8859-1"><p>caf\xe9</p>',
            "text/html",
            "caf\u00e9",
            "text/markdown",
        ),
    ],
)
async def test_kinds_and_charsets(
    pack: Pack, side: FarSide, body: bytes, content_type: str | None, text: str, media_type: str
) -> None:
    side.behave = answer(200, body, content_type)
    document = await fetch(pack, side.url)
    assert (document["text"], document["media_type"]) == (text, media_type)


async def test_markdown_is_known_by_its_path(pack: Pack, side: FarSide) -> None:
    side.behave = answer(200, b"# Hi", "text/plain")
    document = await fetch(pack, side.url.replace("/call", "/a/README.md?raw=1"))
    assert document["media_type"] == "text/markdown"


async def test_a_compressed_page_is_read_within_the_limit(pack: Pack, side: FarSide) -> None:
    side.behave = answer(200, gzip.compress(b"words"), "text/plain", Content_Encoding="gzip")
    assert (await fetch(pack, side.url))["text"] == "words"
    bomb = gzip.compress(b"x" * 10_000_000)
    assert len(bomb) < LIMIT
    failed = await failure(pack, side, answer(200, bomb, "text/plain", Content_Encoding="gzip"))
    assert failed.code == "page_refused"


@pytest.mark.parametrize(
    ("behave", "code", "retryable"),
    [
        (answer(404), "capability_refused", False),
        (answer(429), "capability_overloaded", True),
        (answer(503), "capability_unavailable", True),
        (answer(200, b"%PDF", "application/pdf"), "media_type_unsupported", False),
        (answer(200, b"x", "image/png"), "media_type_unsupported", False),
        (answer(200, b" \n", "text/plain"), "document_empty", False),
        (answer(200, b"<script>x</script>", "text/html"), "document_empty", False),
        (answer(200, b"x" * (LIMIT + 1), "text/plain"), "page_refused", False),
        (raw(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (LIMIT + 1)), "page_refused", False),
        (raw(b"", reset=True), "capability_connection_lost", True),
        (answer(302, b"", None), "capability_refused", False),
        (answer(302, b"", None, Location="file:///etc/passwd"), "egress_refused", False),
        (answer(302, b"", None, Location="http://169.254.169.254/"), "egress_refused", False),
        (answer(302, b"", None, Location="http://[::1]/"), "egress_refused", False),
        (answer(302, b"", None, Location="//0x7f.1/x"), "egress_refused", False),
        (answer(302, b"", None, Location="http://u:p@example.org/"), "egress_refused", False),
        (answer(302, b"", None, Location="http://[/"), "egress_refused", False),
        (answer(302, b"", None, Location="http://a:9x/"), "capability_refused", False),
    ],
)
async def test_failures(
    pack: Pack, side: FarSide, behave: Behaviour, code: str, retryable: bool
) -> None:
    failed = await failure(pack, side, behave)
    assert (failed.code, failed.retryable) == (code, retryable)


async def test_redirects_are_followed_five_times(pack: Pack, side: FarSide) -> None:
    async def hop(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        left = int(exchange.target.rpartition("/")[2])
        if left:
            cookie = {"Set_Cookie": "a=b"}
            await answer(307, b"", None, Location=f"{left - 1}", **cookie)(writer, exchange)
        else:
            await answer(200, b"there", "text/plain")(writer, exchange)

    side.behave = hop
    base = side.url.replace("/call", "/hop/")
    document = await fetch(pack, base + "5")
    assert (document["text"], document["source"]) == ("there", base + "0")
    assert all("cookie" not in exchange.headers for exchange in side.exchanges)
    with pytest.raises(CallFailed) as caught:
        await fetch(pack, base + "6")
    assert caught.value.code == "too_many_redirects"


async def test_the_deadline_covers_redirects_and_body(pack: Pack, side: FarSide) -> None:
    async def hang(writer: asyncio.StreamWriter, _exchange: Exchange) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx")
        await writer.drain()
        await side.closing.wait()

    failed = await failure(pack, side, hang, deadline_ms=200)
    assert (failed.code, failed.retryable) == ("capability_timeout", True)


async def test_a_private_page_is_refused(side: FarSide) -> None:
    transport = EgressTransport(EgressPolicy())
    with pytest.raises(CallFailed) as caught:
        await fetch(fetch_pack(transport), side.url)
    assert caught.value.code == "egress_refused"
    assert side.connections == 0
    await transport.aclose()


@pytest.mark.parametrize(
    "html",
    [
        "<div>" * 400_000,
        "".join(f"<b id={n}>" for n in range(3_000)) + "<p>x" * 100_000,
        "<a href=https://x.y/>x " * 30_000,
        "<!--" * 200_000,
        "<p>" + "".join(f"<i id={n}><div>" for n in range(15_000)),
        "<table>" * 50_000,
        "<" * 500_000,
    ],
)
def test_hostile_pages_take_bounded_time(html: str) -> None:
    # The time-out of the test is the assertion.
    html_to_markdown(html)


def test_pages_without_a_main_part_and_with_all_of_it_in_a_form() -> None:
    assert html_to_markdown("<p>a<p>b") == ("", "a\n\nb")
    assert html_to_markdown("<form><p>a</p></form>") == ("", "a")
    assert html_to_markdown("") == ("", "")
    assert html_to_markdown("<h1>T</h1><pre>```\nx\n```</pre>") == (
        "T",
        "# T\n\n~~~~\n```\nx\n```\n~~~~",
    )
