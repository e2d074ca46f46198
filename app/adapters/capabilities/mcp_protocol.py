"""The Model Context Protocol, as far as calling tools needs it: messages, tools and their pins.

Source: the specification at modelcontextprotocol.io, revision 2026-07-28 (stateless: every request
says its version in `_meta`) and, for servers that begin with an `initialize` handshake, 2025-11-25
and earlier. Pure: `mcp_http.py` and `mcp_stdio.py` carry messages, `mcp_session.py` decides which.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from app.adapters.capabilities.egress_transport import SendProgress
from app.adapters.capabilities.mcp_params import MirrorInvalid, Mirrors, mirrors_of
from app.domain.json_schema import canonical_sha256
from app.ports import CallFailed
from app.version import VERSION

log = logging.getLogger("flexrun.mcp")

MODERN = "2026-07-28"
LEGACY = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
"""Revisions with a handshake, newest first."""

CLIENT_INFO = {"name": "flexrun", "version": VERSION}
TOOLS_CHANGED = "notifications/tools/list_changed"

HEADER_MISMATCH = -32_020
CAPABILITY_MISSING = -32_021
VERSION_UNSUPPORTED = -32_022
# Nothing was done: the request was not understood, or not accepted.
_NOT_DONE = frozenset(
    {-32_700, -32_600, -32_601, -32_602, HEADER_MISMATCH, CAPABILITY_MISSING, VERSION_UNSUPPORTED}
)
# Of 2025-11-25 only, where the newer result `input_required` is an error.
_URL_ELICITATION_REQUIRED = -32_042


class RpcRefused(Exception):
    """The server answered with an error. `code` is that of JSON-RPC; None: it has no such answer.

    The message is the server's text: bounded and on one line, for people.
    """

    def __init__(self, code: int | None, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data

    def is_definite(self) -> bool:
        """Whether the server is known to have done nothing."""
        return self.code is None or self.code in _NOT_DONE

    def wants_input(self) -> bool:
        """Whether the tool asks a person for something before it goes on."""
        return self.code == _URL_ELICITATION_REQUIRED


class SessionLost(RpcRefused):
    """The server does not know the session any more, and did not look at the request."""


class Garbled(Exception):
    """An answer that is none: no JSON, too large, or of an unknown shape. Says what it is."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request on its way. `params` hold their `_meta` already.

    `version` is None before one was agreed upon. `name` and `mirrored` become headers where the
    transport has them. `fresh`: a connection of its own. `progress` tells when bytes go out.
    """

    method: str
    params: dict[str, Any]
    version: str | None
    name: str | None = None
    mirrored: Mapping[str, str] = field(default_factory=dict)
    fresh: bool = False
    progress: SendProgress = field(default_factory=SendProgress)

    def message(self, message_id: int) -> dict[str, Any]:
        """The JSON-RPC 2.0 request."""
        return {"jsonrpc": "2.0", "id": message_id, "method": self.method, "params": self.params}


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool as its server lists it. `pin` is what a registration has to name to call it."""

    name: str
    title: str
    description: str
    input_schema: dict[str, Any]
    output_schema: dict[str, Any] | None
    pin: str
    mirrors: Mirrors

    @property
    def is_wrapped(self) -> bool:
        """Whether its structured content may be no object and stands under `result` for us."""
        return self.output_schema is not None and self.output_schema.get("type") != "object"


def notification(method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
    """A message that is not answered."""
    return {"jsonrpc": "2.0", "method": method, **({"params": params} if params else {})}


def meta_of(version: str | None, more: Mapping[str, str]) -> dict[str, Any]:
    """The `_meta` of a request: `more`, and what a modern server wants to know each time."""
    if version != MODERN:
        return dict(more)
    return {
        **more,
        "io.modelcontextprotocol/protocolVersion": MODERN,
        "io.modelcontextprotocol/clientInfo": CLIENT_INFO,
        "io.modelcontextprotocol/clientCapabilities": {},
    }


def is_answer_to(message: Any, message_id: int) -> bool:
    """Whether this is the response to a request; one without a readable id refuses it, too."""
    if not isinstance(message, dict) or "method" in message:
        return False
    found = message.get("id")
    return found == message_id or (found is None and "error" in message)


def result_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """The result in a response.

    Raises `RpcRefused` for an error, `Garbled` for what is neither, and `CallFailed`
    `mcp_input_required` when the server wants to ask somebody something.
    """
    if (refused := refusal_in(message)) is not None:
        raise refused
    result = message.get("result")
    if not isinstance(result, dict):
        raise Garbled("has neither a result nor an error")
    kind = result.get("resultType", "complete")
    if kind == "input_required":
        raise input_required()
    if kind != "complete":
        raise Garbled("is of an unknown result type")
    return result


def refusal_in(message: Any) -> RpcRefused | None:
    """The error of a JSON-RPC response; None when it has none."""
    error = message.get("error") if isinstance(message, dict) else None
    if not isinstance(error, dict) or type(error.get("code")) is not int:
        return None
    text = error.get("message")
    return RpcRefused(error["code"], text if isinstance(text, str) else "", error.get("data"))


def input_required() -> CallFailed:
    """The tool has questions. We declared that we answer none, so it should not have asked."""
    return CallFailed("mcp_input_required", "the tool asks for more input", retryable=False)


def tools_in(result: Mapping[str, Any]) -> Iterator[Tool]:
    """The usable tools of one page of `tools/list`; what is malformed is left out and logged."""
    listed = result.get("tools")
    if not isinstance(listed, list):
        raise Garbled("lists no tools")
    for found in listed:
        if (tool := _tool_of(found)) is not None:
            yield tool


def _tool_of(found: Any) -> Tool | None:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    takes, makes = found.get("inputSchema"), found.get("outputSchema")
    if not isinstance(takes, dict) or not isinstance(makes, dict | None):
        return None
    try:
        mirrors = mirrors_of(takes)
    except MirrorInvalid as error:
        # The specification wants such a tool hidden, and a warning with its name and the reason.
        log.warning("the MCP tool %.100a is not offered: %s", found["name"], error)
        return None
    return Tool(
        name=found["name"],
        title=_text(found.get("title")),
        description=_text(found.get("description")),
        input_schema=takes,
        output_schema=makes,
        pin=pin_of(found),
        mirrors=mirrors,
    )


def pin_of(listed: Mapping[str, Any]) -> str:
    """The SHA-256, in hex, of what a tool says about itself.

    Over the JSON object of `name`, `description`, `inputSchema` and `outputSchema` (null when it
    is not there) in UTF-8, with sorted keys and without white space.
    """
    parts = ("name", "description", "inputSchema", "outputSchema")
    return canonical_sha256({part: listed.get(part) for part in parts})


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
