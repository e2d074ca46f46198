"""The builtin `http.fetch`: one page of the web as a document.

Redirects are followed by hand, at most five, and every hop passes the egress guard anew. No secret,
cookie or credential is ever sent, so none can be carried to another host.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import re
from dataclasses import dataclass
from typing import Any

import httpx

from app.adapters.capabilities.builtin import Pack
from app.adapters.capabilities.egress import EgressPolicy, EgressRefused
from app.adapters.capabilities.egress_transport import EgressTransport, SendProgress
from app.adapters.capabilities.html_text import html_to_markdown
from app.adapters.capabilities.http_body import BodyRefused, read_body
from app.adapters.capabilities.http_outcome import (
    broken_off,
    refused_target,
    status_failure,
    timed_out,
)
from app.adapters.capabilities.pack_facets import TEXT_CHARS_MAX, facets_named
from app.domain.capability import Effect
from app.ports import Call, CallFailed

PAGE_BYTES_MAX = 2 * 1024 * 1024
REDIRECTS_MAX = 5
CONNECT_TIMEOUT_S = 10.0

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HTML = frozenset({"text/html", "application/xhtml+xml"})
_MARKDOWN_PATH = re.compile(r"\.(?:md|markdown|mdown)$", re.IGNORECASE)
_CHARSET = re.compile(r"""charset\s*=\s*["']?([A-Za-z0-9_.:-]{1,40})""", re.IGNORECASE)
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What a reader can not see and a journal can not keep.
_UNWANTED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Page:
    """A fetched page: its final address, its Content-Type header and its bytes."""

    url: httpx.URL
    content_type: str
    body: bytes


def fetch_pack(transport: EgressTransport, *, page_bytes_max: int = PAGE_BYTES_MAX) -> Pack:
    """The pack with `http.fetch` over this transport, which stays the caller's to close."""
    pack = Pack("fetch", facets_named("url", "document"))

    # A GET changes nothing and may be repeated, but its answer is no function of its input:
    # idempotent, not pure.
    @pack.capability(
        capability_id="http.fetch",
        version="1.0.0",
        display_name="Fetch a page",
        summary="Gets a web page and reduces it to a document: HTML, Markdown, text or JSON.",
        inputs=["url"],
        outputs=["document"],
        effect=Effect.IDEMPOTENT,
        cost_tier=1,
        timeout_s=30,
    )
    async def http_fetch(call: Call) -> dict[str, Any]:
        """`{url}` -> `{document}`.

        Raises CallFailed as `http_outcome` tells, and `page_refused` (too large or not readable),
        `media_type_unsupported`, `document_empty`, `too_many_redirects`: none retryable.
        """
        if call.deadline_ms <= 0:
            raise timed_out(sent=False)
        progress = SendProgress()
        try:
            async with asyncio.timeout(call.deadline_ms / 1000):
                page = await _get(transport, call.inputs["url"], page_bytes_max, progress)
        except TimeoutError as error:
            raise timed_out(sent=progress.sent) from error
        except httpx.HTTPError as error:
            raise broken_off(error, sent=progress.sent) from error
        except EgressRefused as error:
            raise refused_target(error) from error
        except BodyRefused as error:
            raise CallFailed("page_refused", f"the page: {error}", retryable=False) from error
        # Reading a large page takes long enough to hold up others.
        return {"document": await asyncio.to_thread(document_of, page)}

    return pack


async def _get(
    transport: EgressTransport, address: str, bytes_max: int, progress: SendProgress
) -> Page:
    url = transport.policy.check_url(address).copy_with(fragment=None)
    for _ in range(REDIRECTS_MAX + 1):
        response = await transport.handle_async_request(_request(url, progress))
        async with contextlib.aclosing(response):
            if response.status_code not in _REDIRECTS or "location" not in response.headers:
                return await _read(url, response, bytes_max)
        url = _next_hop(transport.policy, url, response.headers["location"])
    text = f"the page redirects more than {REDIRECTS_MAX} times"
    raise CallFailed("too_many_redirects", text, retryable=False)


def _next_hop(policy: EgressPolicy, url: httpx.URL, location: str) -> httpx.URL:
    try:
        following = str(url.join(location))
    except (httpx.InvalidURL, ValueError) as error:
        text = "the page redirects to an address that can not be parsed"
        raise CallFailed("capability_refused", text, retryable=False) from error
    return policy.check_url(following).copy_with(fragment=None)


def _request(url: httpx.URL, progress: SendProgress) -> httpx.Request:
    return httpx.Request(
        "GET",
        url,
        headers={
            "Accept": "text/html, text/markdown, text/plain;q=0.9, application/json;q=0.8",
            "Accept-Encoding": "identity",
            "User-Agent": "flexrun-fetch/1.0",
        },
        extensions={"timeout": {"connect": CONNECT_TIMEOUT_S}, "trace": progress},
    )


async def _read(url: httpx.URL, response: httpx.Response, bytes_max: int) -> Page:
    if not response.is_success:
        raise status_failure(response, "")
    body = await read_body(response, bytes_max)
    return Page(url, response.headers.get("content-type", ""), body)


def document_of(page: Page) -> dict[str, Any]:
    """The facet `document` of a fetched page; `source` is the address after all redirects."""
    url, content_type, body = page.url, page.content_type, page.body
    media_type = content_type.split(";")[0].strip().lower() or "text/plain"
    title = ""
    if media_type in _HTML:
        title, text = html_to_markdown(_decoded(body, content_type, sniff_meta=True))
        media_type = "text/markdown"
    elif media_type == "application/json" or media_type.endswith("+json"):
        text = _decoded(body, content_type)
        media_type = "application/json"
    elif media_type.startswith("text/") or media_type in ("application/xml", "application/toml"):
        text = _decoded(body, content_type)
        is_markdown = media_type == "text/markdown" or _MARKDOWN_PATH.search(url.path)
        media_type = "text/markdown" if is_markdown else "text/plain"
    else:
        shown = "".join(char for char in media_type[:60] if char.isprintable())
        text = f"a page of type {shown!r} can not be read as text"
        raise CallFailed("media_type_unsupported", text, retryable=False)
    text = _UNWANTED.sub("\ufffd", text)[:TEXT_CHARS_MAX]
    if not text.strip():
        raise CallFailed("document_empty", "the page holds no text", retryable=False)
    document = {"text": text, "media_type": media_type, "source": str(url)}
    if title:
        document["title"] = _UNWANTED.sub("", title)[:500]
    return document


def _decoded(body: bytes, content_type: str, *, sniff_meta: bool = False) -> str:
    """The text by byte order mark, declared charset, UTF-8, and at last Windows-1252."""
    for mark, codec in _BOMS:
        if body.startswith(mark):
            return body.decode(codec, "replace")
    declared = _CHARSET.search(content_type)
    if declared is None and sniff_meta:
        declared = _CHARSET.search(body[:2048].decode("latin-1"))
    if declared:
        with contextlib.suppress(LookupError, UnicodeError):
            return body.decode(declared.group(1), "replace")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        return body.decode("cp1252", "replace")
