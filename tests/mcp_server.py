"""A small MCP server, for both transports and both eras of the protocol, that can misbehave.

Run as a script it speaks over its standard streams and needs nothing but the standard library;
`MCP_ERA` is `modern` (2026-07-28), `legacy` (2025-11-25), `mute` (legacy, leaves what it does not
know unanswered) or `strict` (legacy, ends at what comes before the handshake). Over HTTP it is a
behaviour of `tests.far_side`, see `over_http`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from tests.far_side import Behaviour, Exchange

MODERN = "2026-07-28"
LEGACY = "2025-11-25"
SESSION = "session-1"

_ANY = {"type": "object"}
_NUMBERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
_SUM = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
_REGION = {
    "type": "object",
    "properties": {
        "region": {"type": "string", "x-mcp-header": "Region"},
        "deep": {
            "type": "object",
            "properties": {
                "level": {"type": "integer", "x-mcp-header": "Level"},
                "on": {"type": "boolean", "x-mcp-header": "On"},
            },
        },
    },
}
_LIST = {"type": "array", "items": {"$ref": "#/$defs/n"}, "$defs": {"n": {"type": "integer"}}}

TOOLS: dict[str, dict[str, Any]] = {
    name: {"name": name, "description": description, "inputSchema": takes}
    | ({} if makes is None else {"outputSchema": makes})
    for name, description, takes, makes in [
        ("add", "Adds two numbers.", _NUMBERS, _SUM),
        ("say", "Says what it was told.", _ANY, None),
        ("pair", "Gives a list.", _ANY, _LIST),
        ("fail", "Fails.", _ANY, None),
        ("refuse", "Answers with the error code that it was told.", _ANY, None),
        ("ask", "Asks back.", _ANY, None),
        ("big", "Says as many letters as it was told.", _ANY, None),
        ("odd", "Answers with the result that it was told.", _ANY, _SUM),
        ("raw", "Writes the text that it was told, then answers.", _ANY, None),
        ("hang", "Never answers.", _ANY, None),
        ("stall", "Never answers, and reads nothing more.", _ANY, None),
        ("spawn", "Starts a process that lives on, and gives its id.", _ANY, _ANY),
        ("die", "Ends the process.", _ANY, None),
        ("heard", "Lists the messages that came in.", _ANY, _ANY),
        ("change", "Changes the description of `add`, and says so.", _ANY, None),
        ("env", "Gives its environment.", _ANY, _ANY),
        ("region", "Takes parameters that are repeated in headers.", _REGION, None),
    ]
}
# A client must not offer this one: no header name has a blank.
TOOLS["twisted"] = {
    "name": "twisted",
    "inputSchema": {
        "type": "object",
        "properties": {"a": {"type": "string", "x-mcp-header": "A b"}},
    },
}


class McpServer:
    """Answers messages. `ttl_ms` is how long its listing may be believed; None: it does not say."""

    def __init__(self, era: str = "modern", ttl_ms: int | None = 60_000) -> None:
        self.era = era
        self.ttl_ms = ttl_ms
        self.tools = {name: dict(tool) for name, tool in TOOLS.items()}
        self.heard: list[dict[str, Any]] = []
        self.listens_to: Any = None
        self.is_open = era == "modern"
        self.page = 4

    @property
    def is_legacy(self) -> bool:
        return self.era != "modern"

    def methods(self) -> list[str]:
        """What was asked for, in order."""
        return [message.get("method", "") for message in self.heard]

    def hear(self, message: dict[str, Any]) -> Iterator[dict[str, Any] | str]:
        """What to send because of a message; a text is written as it is."""
        self.heard.append(message)
        method, params = message.get("method", ""), message.get("params") or {}
        if method == "tools/call" and self.is_open:
            yield from self.call(message["id"], params["name"], params.get("arguments") or {})
        elif method == "subscriptions/listen" and not self.is_legacy:
            self.listens_to = message["id"]
        elif (result := self.result(method, params)) is not None:
            yield self.done(message["id"], result)
        elif "id" in message and "method" in message:
            if self.era == "strict" and not self.is_open:
                os._exit(1)
            if self.era != "mute":
                error = {"code": -32601, "message": f"no method {method}"}
                yield {"jsonrpc": "2.0", "id": message["id"], "error": error}

    def done(self, message_id: Any, result: dict[str, Any]) -> dict[str, Any]:
        more = {} if self.is_legacy else {"resultType": "complete"}
        return {"jsonrpc": "2.0", "id": message_id, "result": {**more, **result}}

    def result(self, method: str, params: dict[str, Any]) -> dict[str, Any] | None:
        capabilities = {"tools": {"listChanged": True}}
        if method == "server/discover" and not self.is_legacy:
            return {"supportedVersions": [MODERN], "capabilities": capabilities, **self.hint()}
        if method == "initialize" and self.is_legacy:
            self.is_open = True
            info = {"name": "test", "version": "1"}
            version = params["protocolVersion"]
            return {"protocolVersion": version, "capabilities": capabilities, "serverInfo": info}
        if method == "tools/list" and self.is_open:
            start = int(params.get("cursor", 0))
            names = list(self.tools)[start : start + self.page]
            end = start + self.page
            more = {"nextCursor": str(end)} if end < len(self.tools) else {}
            return {"tools": [self.tools[name] for name in names], **more, **self.hint()}
        return None

    def hint(self) -> dict[str, Any]:
        return {} if self.ttl_ms is None else {"ttlMs": self.ttl_ms, "cacheScope": "public"}

    def call(
        self, message_id: Any, name: str, given: dict[str, Any]
    ) -> Iterator[dict[str, Any] | str]:
        if name == "hang":
            return
        if name == "stall":
            time.sleep(1_000)
        if name == "die":
            os._exit(3)
        if name == "refuse":
            error = {"code": given["code"], "message": given.get("message", "refused")}
            yield {"jsonrpc": "2.0", "id": message_id, "error": error}
            return
        if name == "raw":
            yield given["text"].replace("ID", str(message_id))
        if name == "change":
            self.tools["add"]["description"] = "Subtracts."
            meta = {"io.modelcontextprotocol/subscriptionId": self.listens_to}
            if self.is_legacy or self.listens_to is not None:
                method = "notifications/tools/list_changed"
                yield {"jsonrpc": "2.0", "method": method, "params": {"_meta": meta}}
        yield self.done(message_id, self.tool_result(name, given))

    def tool_result(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        if name == "add":
            return structured({"sum": given["a"] + given["b"]})
        if name == "pair":
            return structured([1, 2])
        if name == "heard":
            return structured({"heard": self.heard})
        if name == "spawn":
            code = "import time; print(flush=True); time.sleep(1_000)"
            child = subprocess.Popen([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE)
            assert child.stdout is not None
            child.stdout.readline()
            return structured({"pid": child.pid})
        if name == "env":
            return structured(dict(os.environ))
        if name == "ask":
            return {"resultType": "input_required", "inputRequests": {}}
        if name == "odd":
            return dict(given["result"])
        if name == "fail":
            text = given.get("why", "the disk is full")
            return {"content": [{"type": "text", "text": text}], "isError": True}
        text = "x" * given["letters"] if name == "big" else json.dumps(given)
        picture = {"type": "image", "data": "", "mimeType": "image/png"}
        return {"content": [{"type": "text", "text": text}, picture]}


def structured(value: Any) -> dict[str, Any]:
    """A result with structured content, and the text of it beside."""
    return {"content": [{"type": "text", "text": json.dumps(value)}], "structuredContent": value}


def over_http(server: McpServer, *, streamed: bool = False) -> Behaviour:
    """The server behind one URL; `streamed` answers by events with a notification before."""
    from tests.far_side import answer

    def refusal(exchange: Exchange) -> bytes | None:
        version = exchange.headers.get("mcp-protocol-version")
        if not server.is_legacy and version != MODERN:
            supported = {"supported": [MODERN], "requested": version}
            error = {"code": -32022, "message": "Unsupported protocol version", "data": supported}
            return json.dumps({"jsonrpc": "2.0", "id": None, "error": error}).encode()
        is_known = exchange.headers.get("mcp-session-id") == SESSION and server.is_open
        return b"who are you" if server.is_legacy and not is_known else None

    async def behave(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        message = exchange.json if exchange.body else {}
        if exchange.method == "DELETE":
            server.heard.append({"method": "DELETE"})
            await answer(204, b"", None)(writer, exchange)
            return
        is_first = message.get("method") == "initialize"
        if not is_first and (body := refusal(exchange)) is not None:
            has_session = "mcp-session-id" in exchange.headers
            await answer(404 if has_session else 400, body)(writer, exchange)
            return
        sent = list(server.hear(message))
        more = {"Mcp-Session-Id": SESSION} if is_first else {}
        if "id" not in message:
            await answer(202, b"", None)(writer, exchange)
        elif streamed:
            await answer(200, events(sent), "text/event-stream", **more)(writer, exchange)
        else:
            text = sent[0] if isinstance(sent[0], str) else json.dumps(sent[-1])
            await answer(200, text.encode(), **more)(writer, exchange)

    return behave


def events(messages: list[dict[str, Any] | str]) -> bytes:
    """Messages as a stream of events, among comments, other events and priming ones."""
    progress = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {}}
    parts = [b": hello\r\n\r\n", b"id: 1\ndata:\n\n", b"event: other\ndata: {\n\n"]
    for message in (progress, *messages):
        text = message if isinstance(message, str) else json.dumps(message, indent=1)
        lines = "".join(f"data: {line}\r\n" for line in text.splitlines())
        parts.append(f"event: message\r\n{lines}\r\n".encode())
    return b"".join(parts)


def main() -> None:
    """Speak over the standard streams, and end with stdin."""
    server = McpServer(os.environ.get("MCP_ERA", "modern"))
    sys.stderr.write("hello from the server\n")
    sys.stderr.flush()
    for line in sys.stdin:
        for message in server.hear(json.loads(line)):
            text = message if isinstance(message, str) else json.dumps(message)
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
