"""Reading request bodies: bounded, in time, JSON only, through the strict gate.

Routes that read a body take the `Request` and call these, so that nothing is parsed twice and no
lenient parser comes first. `documented_body` puts the body into OpenAPI instead.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from app.api.errors import RequestTimeout, UnsupportedMediaType, malformed_json
from app.api.faults import faults_of_validation
from app.api.inline import inlined_schema
from app.domain.errors import TooLarge, Unprocessable
from app.kit.json_gate import JsonRefused, parse_json

ARRIVAL_S = 10.0
GATE_INLINE_BYTES_MAX = 64 * 1024
"""Bigger bodies pass the gate in a thread: other requests do not wait for them."""

M = TypeVar("M", bound=BaseModel)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, `b""` when there is none.

    Raises `TooLarge` as soon as more than `limit` bytes are announced or there,
    `UnsupportedMediaType` when what comes is not plain JSON, `RequestTimeout` after 10 s.
    """
    media_type, announced, is_encoded = _body_headers(request)
    if announced > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(ARRIVAL_S):
            chunk, has_more = await _receive(request)
            if not chunk and not has_more:
                return chunk
            if is_encoded or not _is_json(media_type):
                raise UnsupportedMediaType("Send application/json, without a content encoding.")
            if not has_more and len(chunk) <= limit:
                return chunk
            return await _rest(request, chunk, has_more=has_more, limit=limit)
    except TimeoutError:
        raise RequestTimeout(f"The body did not arrive within {ARRIVAL_S:.0f} s.") from None


async def parsed(body: bytes) -> Any:
    """The body as a JSON value. Raises `BadInput` `malformed_json`."""
    try:
        if len(body) > GATE_INLINE_BYTES_MAX:
            return await asyncio.to_thread(parse_json, body)
        return parse_json(body)
    except JsonRefused as refused:
        raise malformed_json(refused) from None


async def read_json_model(request: Request, model: type[M], limit: int) -> M:
    """The body as a model; raises what `read_body` and `validated` raise."""
    return await validated(await read_body(request, limit), model)


async def validated(body: bytes, model: type[M]) -> M:
    """A body as a model; also raises `Unprocessable` with a pointer for every broken rule."""
    value = await parsed(body)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = faults_of_validation(error, value=value)
    raise Unprocessable("The body is not valid.", faults=faults)


_without_schema: list[tuple[dict[str, Any], type[BaseModel]]] = []


def documented_body(model: type[BaseModel], example: Any = None) -> dict[str, Any]:
    """`openapi_extra` of a route that reads this model, once `describe_bodies` was called."""
    media = {} if example is None else {"example": example}
    _without_schema.append((media, model))
    return {"requestBody": {"required": True, "content": {"application/json": media}}}


def describe_bodies() -> None:
    """Give all documented bodies their schemas. Nobody but /openapi.json needs them, and to make
    them is a twentieth of a start."""
    for media, model in _without_schema:
        media["schema"] = inlined_schema(model)
    _without_schema.clear()


async def _receive(request: Request) -> tuple[bytes, bool]:
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


async def _rest(request: Request, chunk: bytes, *, has_more: bool, limit: int) -> bytes:
    chunks = [chunk]
    size = len(chunk)
    while size <= limit:
        if not has_more:
            return b"".join(chunks)
        chunk, has_more = await _receive(request)
        size += len(chunk)
        chunks.append(chunk)
    raise _too_large(limit)


def _body_headers(request: Request) -> tuple[bytes, int, bool]:
    """`(content type, announced length or 0, whether there is a content encoding)`."""
    media_type, announced, is_encoded = b"", 0, False
    for name, value in request.scope["headers"]:
        if name == b"content-type":
            media_type = value
        elif name == b"content-length":
            announced = int(value) if value.isdigit() else 0
        elif name == b"content-encoding":
            is_encoded = value.strip().lower() != b"identity"
    return media_type, announced, is_encoded


def _is_json(media_type: bytes) -> bool:
    if media_type == b"application/json":
        return True
    essence = media_type.partition(b";")[0].strip().lower()
    return essence == b"application/json" or (
        essence.startswith(b"application/") and essence.endswith(b"+json")
    )


def _too_large(limit: int) -> TooLarge:
    return TooLarge(
        f"The body is larger than {limit} bytes.", code="body_too_large", extra={"limit": limit}
    )
