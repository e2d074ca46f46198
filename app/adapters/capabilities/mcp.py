"""The capability kind `mcp`: a node is one call of a tool of an MCP server.

    config: {"url": "https://…/mcp", "tool": "…", "description_sha256": "…",
             "headers": {…}, "secret_headers": {"Authorization": "<name>"}}
    config: {"server": "<a name in the operator's file>", "tool": "…", "description_sha256": "…"}

The inputs are the tool's arguments. The output is its structured content, under `result` where the
output schema does not ask for an object; a tool without an output schema gives `{"text": …}`.
`description_sha256` pins what the tool says about itself: one that says something else by now is
not called (`mcp_tool_changed`). What failures mean stands in `http_outcome.py`; `mcp_tool_failed`
is a tool's own word that it failed, a definite answer like garbage.

The client is ours, not the `mcp` package: its HTTP goes over httpx2 and can not take the guarded
transport, and it would cost every process 57 MB for what is a POST, or a line to a pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from app.adapters.capabilities.egress_transport import EgressTransport, SendProgress
from app.adapters.capabilities.http_outcome import garbage, plain_line, timed_out
from app.adapters.capabilities.http_target import (
    TARGET_KEYS,
    ConfigFault,
    Target,
    TargetRules,
    as_faults,
    check_again,
    host_scope,
    unexpected_keys,
)
from app.adapters.capabilities.mcp_http import HttpChannel, is_mcp_header
from app.adapters.capabilities.mcp_process import Command
from app.adapters.capabilities.mcp_protocol import Garbled, RpcRefused, Tool, input_required
from app.adapters.capabilities.mcp_session import McpSession, ToolCall
from app.adapters.capabilities.mcp_stdio import StdioServer
from app.adapters.capabilities.secrets import SecretStore
from app.domain.capability import Capability, Effect
from app.domain.errors import Fault
from app.ports import Call, CallFailed

VALUE_BYTES_MAX = 2 * 1024 * 1024
# A message holds a value as structured content and, escaped, as the text of it.
MESSAGE_FACTOR = 4
SESSIONS_MAX = 256
TOOL_NAME_CHARS_MAX = 200
IDEMPOTENCY_KEY = "dev.flexrun/idempotency-key"

_PIN = re.compile(r"[0-9a-f]{64}")
_TOOL_KEYS = frozenset({"tool", "description_sha256"})
_SERVER_KEYS = _TOOL_KEYS | {"server"}


class McpAdapter:
    """Runs `mcp` capabilities: over the guarded transport, and on the operator's own `servers`.

    The adapter owns the servers and the sessions, `aclose()` ends them; the transport is shared.
    """

    def __init__(
        self,
        transport: EgressTransport,
        secrets: SecretStore | None = None,
        servers: Mapping[str, Command] | None = None,
        *,
        value_bytes_max: int = VALUE_BYTES_MAX,
    ) -> None:
        self._transport = transport
        self._rules = TargetRules(
            "mcp",
            transport.policy,
            secrets or SecretStore(),
            keys=TARGET_KEYS | _TOOL_KEYS,
            is_own=is_mcp_header,
        )
        self._bytes_max = MESSAGE_FACTOR * value_bytes_max
        self._servers = {
            name: StdioServer(command, self._bytes_max) for name, command in (servers or {}).items()
        }
        self._sessions: OrderedDict[str, McpSession] = OrderedDict()

    async def aclose(self) -> None:
        """End sessions and servers; calls under way fail."""
        sessions = [session.aclose() for session in self._sessions.values()]
        await asyncio.gather(*sessions, *(server.aclose() for server in self._servers.values()))

    def check(self, capability: Capability) -> list[Fault]:
        """Faults with pointers into `/config`. Neither names nor tools are looked up here."""
        return as_faults(self._faults(capability.registration.config), capability)

    def inline(self, capability: Capability) -> None:
        """Never: every call waits for a server."""
        return

    def breaker_scope(self, capability: Capability, tenant_id: str) -> str | None:
        """`tool::host[:port]` as for the kind `http`, or `tool::stdio:<server>`."""
        server = capability.registration.config.get("server")
        if server is None:
            return host_scope(capability, tenant_id)
        return f"{capability.capability_id}::stdio:{server}"

    async def invoke(self, call: Call) -> dict[str, Any]:
        """The output of one tool call; raises `CallFailed`. The deadline covers the start of the
        server, the look at the tool, and the call."""
        config = call.capability.registration.config
        check_again(self._faults(config))
        effect = call.capability.registration.effect
        if call.deadline_ms <= 0:
            raise timed_out(sent=False)
        asked = ToolCall(
            name=config["tool"],
            pin=config["description_sha256"],
            arguments=dict(call.inputs),
            meta=_meta(call),
            fresh=effect is Effect.AT_MOST_ONCE,
            progress=SendProgress(),
        )
        with _failures(asked.progress, effect):
            async with asyncio.timeout(call.deadline_ms / 1000):
                session = await self._session(config)
                tool, result = await session.call(asked)
            return _output(tool, result, effect)

    async def tools(self, config: dict[str, Any], timeout_s: float) -> list[Tool]:
        """What a server offers, for a config without tool and pin; raises `CallFailed`."""
        check_again(self._server_faults(config))
        with _failures(SendProgress(), Effect.PURE):
            async with asyncio.timeout(timeout_s):
                return await (await self._session(config)).tools()

    async def _session(self, config: dict[str, Any]) -> McpSession:
        if "server" in config:
            return await self._servers[config["server"]].session()
        target = self._rules.target(config)
        key = _key(target)
        session = self._sessions.get(key)
        if session is None:
            session = McpSession(HttpChannel(self._transport, target, self._bytes_max))
            self._sessions[key] = session
            if len(self._sessions) > SESSIONS_MAX:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(key)
        return session

    def _faults(self, config: dict[str, Any]) -> Iterator[ConfigFault]:
        yield from self._server_faults(config)
        tool, pin = config.get("tool"), config.get("description_sha256")
        if not isinstance(tool, str) or not 0 < len(tool) <= TOOL_NAME_CHARS_MAX:
            yield "config_invalid", "an mcp capability needs the name of a tool", "/tool"
        if not isinstance(pin, str) or not _PIN.fullmatch(pin):
            text = "an mcp capability needs the pin of its tool, as `import-mcp` prints it"
            yield "config_invalid", text, "/description_sha256"

    def _server_faults(self, config: dict[str, Any]) -> Iterator[ConfigFault]:
        if "server" not in config:
            yield from self._rules.faults(config)
            return
        yield from unexpected_keys("mcp", config, _SERVER_KEYS)
        name = config["server"]
        if not isinstance(name, str) or name not in self._servers:
            yield "mcp_server_unknown", "the operator has no MCP server of this name", "/server"


def _key(target: Target) -> str:
    """What tells sessions apart; a hash, since headers hold secrets."""
    parts = [str(target.url), sorted(target.headers.items())]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()


def _meta(call: Call) -> dict[str, str]:
    """What a server gets to know about the call beside its arguments."""
    trace = {"traceparent": call.traceparent} if call.traceparent else {}
    return {IDEMPOTENCY_KEY: call.idempotency_key, **trace}


def _output(tool: Tool, result: dict[str, Any], effect: Effect) -> dict[str, Any]:
    if result.get("isError") is True:
        text = plain_line(_text(result)) or "the tool failed and does not say why"
        is_harmless = effect is not Effect.AT_MOST_ONCE
        raise CallFailed("mcp_tool_failed", text, retryable=is_harmless)
    if tool.output_schema is None:
        return {"text": _text(result)}
    if "structuredContent" not in result:
        raise Garbled("has no structured content")
    found = result["structuredContent"]
    if tool.is_wrapped:
        return {"result": found}
    if not isinstance(found, dict):
        raise Garbled("has a structured content that is no object")
    return found


def _text(result: dict[str, Any]) -> str:
    """The text among the content, a part a line; pictures and links are left out."""
    content = result.get("content")
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


@contextlib.contextmanager
def _failures(progress: SendProgress, effect: Effect) -> Iterator[None]:
    """Everything that may go wrong as `CallFailed`; until the call went out, nothing happened."""
    try:
        yield
    except TimeoutError as error:
        raise timed_out(sent=progress.sent) from error
    except Garbled as error:
        is_harmless = effect is not Effect.AT_MOST_ONCE or not progress.sent
        raise garbage(str(error), retryable=is_harmless) from error
    except RpcRefused as error:
        raise _refused(error, sent=progress.sent) from error
    except CallFailed as failed:
        failed.unknown_outcome = failed.unknown_outcome and progress.sent
        raise


def _refused(error: RpcRefused, *, sent: bool) -> CallFailed:
    """JSON-RPC errors are like statuses: 4xx when nothing was done, else like 5xx."""
    if error.wants_input():
        return input_required()
    text = plain_line(error.message) or f"answered with error {error.code}"
    if error.is_definite():
        return CallFailed("capability_refused", text, retryable=False)
    return CallFailed(
        "capability_unavailable", text, retryable=True, unknown_outcome=sent, target_failed=True
    )
