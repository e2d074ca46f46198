"""Reading response bodies with a limit, so that none takes more memory than was meant."""

from __future__ import annotations

import zlib

import httpx


class BodyRefused(Exception):
    """The body is larger than the limit, or its encoding can not be undone."""


async def read_body(response: httpx.Response, bytes_max: int) -> bytes:
    """The whole decoded body; raises `BodyRefused`, and httpx's errors while it arrives.

    Adapters ask for `identity`; gzip and deflate are undone all the same, within the limit, so
    that a small body can not swell up.
    """
    declared = response.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > bytes_max:
        raise BodyRefused(f"the answer is larger than {bytes_max} bytes")
    raw = await read_prefix(response, bytes_max + 1)
    if len(raw) > bytes_max:
        raise BodyRefused(f"the answer is larger than {bytes_max} bytes")
    return _decoded(raw, response.headers.get("content-encoding", "").strip().lower(), bytes_max)


async def read_prefix(response: httpx.Response, bytes_max: int) -> bytes:
    """At most the first `bytes_max` bytes as they came over the wire."""
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_raw():
        parts.append(part)
        size += len(part)
        if size >= bytes_max:
            break
    return b"".join(parts)[:bytes_max]


def _decoded(raw: bytes, encoding: str, bytes_max: int) -> bytes:
    if encoding in ("", "identity"):
        return raw
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise BodyRefused("the answer has an unknown content encoding")
    # 32 + 15: gzip or zlib by their own header.
    inflater = zlib.decompressobj(47)
    try:
        body = inflater.decompress(raw, bytes_max + 1)
    except zlib.error as error:
        raise BodyRefused("the answer's content encoding is broken") from error
    if len(body) > bytes_max:
        raise BodyRefused(f"the answer is larger than {bytes_max} bytes")
    return body
