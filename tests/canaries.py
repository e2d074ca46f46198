"""Planted texts that must not get out, and the places where they would: for `test_canaries.py`.

A canary is 24 random letters and digits, in the form that the strictest filters let through: it can
stand in a header, be a name, and pass for a vendor's word for an error. It counts as leaked when
its first or its last half is found, since texts are cut.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import logging
import os
import secrets
import string
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import httpx
import orjson

from app.kit.log import configure
from tests import mcp_server
from tests.far_side import Behaviour, Exchange
from tests.model_server import ModelServer
from tests.otlp_sink import OtlpSink
from tests.redis_kit import make_client
from tests.servers import RunningRedis

LENGTH = 24
_LETTERS = string.ascii_lowercase + string.digits
DATA_EVENTS = ("RUN_QUEUED", "NODE_DONE", "NODE_SKIPPED", "RUN_DONE")
STREAMS = (1, 2)
"""Standard output and standard error, as children inherit them."""
INSTRUMENTS = ("/metrics", "/v1/slm/", "/v1/models", "/v1/breakers")


class Sink(StrEnum):
    """Where a text can get out.

    `log`: the lines of the process, at DEBUG, and what it prints. `spans`: every byte that OTLP and
    Langfuse got. `problems`: bodies of answers that are none of 2xx. `instruments`: `INSTRUMENTS`.
    `events`: the journal without `DATA_EVENTS`. `redis`: all its keys and values. `cache`: the
    stored answers of models. `data`: all else in the database and in answers of the API, with the
    debug view.
    """

    LOG = "log"
    SPANS = "spans"
    PROBLEMS = "problems"
    INSTRUMENTS = "instruments"
    EVENTS = "events"
    REDIS = "redis"
    CACHE = "cache"
    DATA = "data"


class Kind(StrEnum):
    """What a canary is. `secret`: the operator's; `prompt`: told to a model; `answer`: a model's,
    and used; `waste`: a far side's, and of no use."""

    SECRET = "secret"
    PROMPT = "prompt"
    ANSWER = "answer"
    WASTE = "waste"


_TOLD = frozenset(Sink) - {Sink.DATA, Sink.REDIS, Sink.CACHE}
FORBIDDEN: dict[Kind, frozenset[Sink]] = {
    Kind.SECRET: frozenset(Sink),
    Kind.WASTE: frozenset(Sink),
    Kind.PROMPT: _TOLD | {Sink.REDIS, Sink.CACHE},
    Kind.ANSWER: _TOLD,
}


def heard(exchange: Exchange) -> str:
    """A request as text, a user and password in clear."""
    scheme, _, pair = exchange.headers.get("authorization", "").partition(" ")
    basic = base64.b64decode(pair).decode() if scheme == "Basic" else ""
    return f"{exchange.headers} {basic} {exchange.body.decode('latin-1')}"


def make_canary() -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(LENGTH))


def is_in(canary: str, text: str) -> bool:
    """Whether a text holds the canary, or enough of it to be of use."""
    return canary[: LENGTH // 2] in text or canary[LENGTH // 2 :] in text


@dataclass
class Caught:
    """Everything that got out, by sink, and what the far sides have `seen` and `said`."""

    sinks: dict[Sink, list[str]] = field(default_factory=lambda: {sink: [] for sink in Sink})
    seen: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def see(self, exchanges: Iterable[Exchange]) -> None:
        """Requests as they came to a far side."""
        self.seen += map(heard, exchanges)

    def is_planted(self, canary: str) -> bool:
        """Whether it came to where it can be betrayed."""
        return any(canary in text for text in (*self.seen, *self.said))

    def leaks(self, canary: str, kind: Kind) -> dict[Sink, str]:
        """Where a canary got out, with the text around it."""
        return {
            sink: found[:2_000]
            for sink in FORBIDDEN[kind]
            for found in self.sinks[sink]
            if is_in(canary, found)
        }


# --- where they are planted ----------------------------------------------------------------------


WIRES = {
    "openai": "kind: openai, base_url: {url}/v1",
    "responses": "kind: openai, api: responses, base_url: {url}/v1",
    "anthropic": "kind: anthropic, base_url: {url}",
    "ollama": "kind: ollama, base_url: {url}",
    "yandex": "kind: yandex, project: folder, base_url: {url}/v1",
}
FLAGS = (
    "ctx_window: 100000, output_tokens_max: 500, json_mode: true, function_calling: false, "
    "cost_tier: free"
)


def models_file(folder: Path, servers: dict[str, ModelServer], c: dict[str, str]) -> Path:
    providers, models = [], []
    for wire, where in WIRES.items():
        address = where.format(url=servers[wire].url)
        key, header = f"CANARY_{wire.upper()}", c[f"header of {wire}"]
        providers.append(f"  {wire}: {{{address}, key_env: {key}, headers: {{X-Team: {header}}}}}")
        roles = "[chat, planning]" if wire == "openai" else "[chat]"
        models.append(f"  {wire}: {{provider: {wire}, {FLAGS}, roles: {roles}}}")
    models.append(f"  vectors: {{provider: openai, {FLAGS}, roles: [embedding]}}")
    file = folder / "models.yaml"
    file.write_text("\n".join(["providers:", *providers, "models:", *models]))
    return file


def secrets_file(folder: Path, c: dict[str, str]) -> Path:
    values = {
        "tool": f"Bearer {c['secret of an http tool']}",
        "mcp": c["secret of an MCP server"],
    }
    file = folder / "secrets.json"
    file.write_bytes(
        orjson.dumps({n: {"value": v, "hosts": ["127.0.0.1"]} for n, v in values.items()})
    )
    return file


def mcp_file(folder: Path, c: dict[str, str]) -> Path:
    """A server that begins by telling its secret to people, and to the file `seen`."""
    code = (
        "import os, pathlib, runpy, sys; key = os.environ['API_KEY']; "
        f"pathlib.Path({str(folder / 'seen')!r}).write_text(key); "
        "print('my key:', key, file=sys.stderr); "
        f"runpy.run_path({mcp_server.__file__!r}, run_name='__main__')"
    )
    env = {"API_KEY": c["environment of an MCP server"]}
    file = folder / "mcp.json"
    local = {"command": [sys.executable, "-I", "-c", code], "env": env}
    file.write_bytes(orjson.dumps({"servers": {"local": local}}))
    return file


def judge(capability_id: str, system_prompt: str, *models: str) -> dict[str, Any]:
    """A capability for which these models are asked one after the other."""
    verdict = {"type": "object", "properties": {"verdict": {"type": "string"}}}
    text = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    closed = {**verdict, "required": ["verdict"], "additionalProperties": False}
    return {
        **far(capability_id, "llm", {}),
        "input_contract": {"schema": text},
        "output_contract": {"schema": closed},
        "preferred_models": list(models),
        "system_prompt": system_prompt,
    }


def far(capability_id: str, kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """A capability that takes and gives whatever it likes."""
    return {
        "capability_id": capability_id,
        "version": "1.0.0",
        "display_name": capability_id,
        "summary": "One under test.",
        "kind": kind,
        "effect": "pure",
        "max_attempts": 1,
        "input_contract": {"schema": {"type": "object"}},
        "output_contract": {"schema": {"type": "object"}},
        "config": config,
    }


# --- far sides that repeat what they hear ---------------------------------------------------------


def speaks(server: ModelServer, caught: Caught, *texts: str) -> None:
    """The next answers of a model, each known as said once it is written."""

    def speaking(text: str) -> Behaviour:
        async def behave(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
            server.say(text)
            await server.speak(writer, exchange)
            caught.said.append(text)

        return behave

    server.behave(*map(speaking, texts))


def says_badly(caught: Caught, status: int, body: str, word: str = "X") -> Behaviour:
    """An answer in no form that the client knows; `word` is also its phrase and in its headers."""

    async def behave(writer: asyncio.StreamWriter, _exchange: Exchange) -> None:
        head = f"HTTP/1.1 {status} {word}\r\nRetry-After: {word}\r\nSet-Cookie: a={word}\r\n"
        writer.write(f"{head}Content-Length: {len(body.encode())}\r\n\r\n{body}".encode())
        caught.said.append(body)

    return behave


def echoes(caught: Caught, status: int, name: str, sentence: str = "") -> Behaviour:
    """A failure that repeats the whole request. It calls itself by the header `name`, or `name`."""

    async def behave(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        word = exchange.headers.get(name, name).rpartition(" ")[2]
        told = f"{sentence} {heard(exchange)}"
        error = {"message": told, "code": word, "type": word, "param": told}
        body = {"error": error, "message": told, "detail": told, "title": word}
        await says_badly(caught, status, orjson.dumps(body).decode(), word)(writer, exchange)

    return behave


def breaks_off(caught: Caught, name: str) -> Behaviour:
    """A stream that calls its failure by the header `name`."""

    async def behave(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        word = exchange.headers[name].rpartition(" ")[2]
        error = {"type": word, "code": word, "message": word}
        event = orjson.dumps({"type": "error", "error": error, "choices": []}).decode()
        is_lines = exchange.target.startswith("/api/")
        await says_badly(caught, 200, event if is_lines else f"data: {event}\n\n")(writer, exchange)

    return behave


# --- what gets out --------------------------------------------------------------------------------


@contextmanager
def lines_of_the_process(caught: Caught) -> Iterator[None]:
    """Log as a process does at DEBUG, and catch its lines and all that is printed meanwhile, by
    its children, too."""
    root = logging.getLogger()
    known = [root, *(found for found in _loggers() if found.level)]
    before = [(found, found.level) for found in known]
    handlers = list(root.handlers)
    out = io.StringIO()
    with (
        children_print_to(caught),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        configure("DEBUG")
        try:
            yield
        finally:
            for found in _loggers():
                found.setLevel(logging.NOTSET)
            for found, level in before:
                found.setLevel(level)
            root.handlers[:] = handlers
    caught.sinks[Sink.LOG] += out.getvalue().splitlines()


@contextmanager
def children_print_to(caught: Caught) -> Iterator[None]:
    """Catch what goes to the standard streams past the objects of `sys`."""
    kept = [os.dup(stream) for stream in STREAMS]
    with tempfile.TemporaryFile() as out:
        for stream in STREAMS:
            os.dup2(out.fileno(), stream)
        try:
            yield
        finally:
            for before, stream in zip(kept, STREAMS, strict=True):
                os.dup2(before, stream)
                os.close(before)
        out.seek(0)
        caught.sinks[Sink.LOG] += out.read().decode(errors="replace").splitlines()


def _loggers() -> list[logging.Logger]:
    return [x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)]


def listen(client: httpx.AsyncClient, caught: Caught) -> None:
    """Catch the body of every answer of the API."""

    async def hear(response: httpx.Response) -> None:
        await response.aread()
        sink = Sink.DATA if response.is_success else Sink.PROBLEMS
        if response.is_success and response.request.url.path.startswith(INSTRUMENTS):
            sink = Sink.INSTRUMENTS
        caught.sinks[sink].append(f"{response.headers} {response.text}")

    client.event_hooks["response"].append(hear)


def catch_spans(caught: Caught, *sinks: OtlpSink) -> None:
    for sink in sinks:
        caught.sinks[Sink.SPANS] += [body.decode("latin-1") for body in sink.bodies()]


async def catch_rows(caught: Caught, dsn: str) -> None:
    """Every row of the database."""
    connection = await asyncpg.connect(dsn)
    try:
        tables = await connection.fetch(
            "select oid::regclass::text as name from pg_class"
            " where relkind = 'r' and relnamespace = 'public'::regnamespace"
        )
        for table in tables:
            name = table["name"]
            for row in await connection.fetch(f"select * from {name}"):
                caught.sinks[_sink_of(name, row)].append(" ".join(map(_text, row.values())))
    finally:
        await connection.close()


def _sink_of(table: str, row: asyncpg.Record) -> Sink:
    if table == "llm_answers":
        return Sink.CACHE
    if table.startswith("events"):
        return Sink.DATA if row["type"] in DATA_EVENTS else Sink.EVENTS
    return Sink.DATA


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


async def catch_redis(caught: Caught, url: str) -> None:
    """Every key with its value."""
    client = make_client(url)
    readers = {
        "string": client.get,
        "hash": client.hgetall,
        "set": client.smembers,
        "zset": lambda key: client.zrange(key, 0, -1),
    }
    try:
        async for key in client.scan_iter(count=1_000):
            kind = await client.type(key)
            if kind != "none":  # its time was over
                caught.sinks[Sink.REDIS].append(f"{key} {await readers[kind](key)}")
    finally:
        await client.aclose()


# --- stores with a password -----------------------------------------------------------------------


@asynccontextmanager
async def postgres_role(postgres_dsn: str, password: str) -> AsyncIterator[str]:
    """A role of this password, as the part of an address before the @."""
    role = f"canary_{make_canary()}"
    admin = await asyncpg.connect(postgres_dsn)
    try:
        await admin.execute(f"create role {role} superuser login password '{password}'")
        yield f"{role}:{quote(password)}"
        await admin.execute(f"drop owned by {role}; drop role {role}")
    finally:
        await admin.close()


@asynccontextmanager
async def redis_user(server: RunningRedis, password: str) -> AsyncIterator[tuple[str, str]]:
    """A user of this password: its name, and the address with both."""
    user = f"canary-{make_canary()}"
    client = make_client(server.url)
    try:
        await client.acl_setuser(
            user,
            enabled=True,
            passwords=[f"+{password}"],
            categories=["+@all"],
            keys=["*"],
            channels=["*"],
        )
        yield user, server.url.replace("://", f"://{user}:{password}@")
        await client.acl_deluser(user)
    finally:
        await client.aclose()


async def lock_out(server: RunningRedis, user: str) -> int:
    """From now on this user of Redis can not log in; how many connections it had, which end."""
    client = make_client(server.url)
    try:
        await client.acl_setuser(user, enabled=False)
        return int(await client.execute_command("CLIENT", "KILL", "USER", user))
    finally:
        await client.aclose()


@asynccontextmanager
async def locked_out(postgres_dsn: str, role: str) -> AsyncIterator[int]:
    """For the time of the block, this role of Postgres can not log in; how many connections it
    had, which end."""
    admin = await asyncpg.connect(postgres_dsn)
    try:
        await admin.execute(f"alter role {role} nologin")
        ended = await admin.fetch(
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = $1", role
        )
        yield len(ended)
        await admin.execute(f"alter role {role} login")
    finally:
        await admin.close()
