"""The cache of model answers: what was answered once is not asked again, by no process.

The gateway asks here before it calls a model. Postgres holds the answers, Redis hot copies of them.
Of all callers in all processes that want one answer at once, one makes the call and the others wait
for it. The right to make it is a row with an end on the database's clock, renewed while the call is
under way: an advisory lock would hold a connection for as long as the model thinks.

Only answers are stored, never a prompt: keys are hashes. A store that is away costs calls, and
never fails one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

from app.domain.chat import ChatAnswer, ChatRequest, Message, Tool
from app.kit.background import Background
from app.ports import HotAnswers
from app.store.database import Database
from app.store.llm_cache import (
    Lease,
    Vacancy,
    answer_from_json,
    answer_to_json,
    give_back,
    look_or_claim,
    renew,
    store_answer,
)
from app.version import VERSION

log = logging.getLogger("flexrun.llm")

LEASE_S = 5.0
"""How long a process that died in the middle of a call is waited for, at most."""
POLL_FIRST_S = 0.02
POLL_MAX_S = 0.2
STATEMENT_S = 2.0
REST_S = 1.0
"""Postgres that was away is not asked again for so long: calls do not queue up before it."""
KEY_FORMAT = 1
"""Grows whenever `cache_key` or the meaning of a stored answer changes."""
CODE_VERSION = f"{VERSION}/{KEY_FORMAT}"

Make: TypeAlias = Callable[[], Awaitable[ChatAnswer]]
Slot: TypeAlias = tuple[str, str]
"""Tenant and key: the place of one answer."""
P = ParamSpec("P")
T = TypeVar("T")


class _AwayError(Exception):
    """Postgres gave no answer that could be used: go on without the cache."""


def cache_key(
    request: ChatRequest,
    *,
    provider: str,
    tenant_id: str,
    inputs_sha256: str = "",
    code_version: str = CODE_VERSION,
) -> str:
    """The sha256, in hex, of everything that an answer depends on; `timeout_s` is no part of it.

    Hashed is canonical JSON: keys sorted by code point, no white space, ASCII with escapes.
    Strings are not normalised and numbers stay as given (1 is not 1.0), unlike RFC 8785: two
    spellings of the same request cost one more call, and never give a wrong answer. Raises
    `ValueError` for NaN and infinity, `TypeError` for what is not JSON.
    """
    parts = {
        "code_version": code_version,
        "tenant_id": tenant_id,
        "provider": provider,
        "model": request.model,
        "options": {
            "temperature": request.temperature,
            "output_tokens_max": request.output_tokens_max,
            "form": request.form,
            "tools": [_tool_part(tool) for tool in request.tools],
        },
        "messages": [_message_part(message) for message in request.messages],
        "schema": request.schema,
        "inputs": inputs_sha256,
    }
    canonical = json.dumps(
        parts,
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
        default=dict,  # a Mapping that is no dict
    )
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _message_part(message: Message) -> dict[str, Any]:
    return {
        "role": message.role,
        "text": message.text,
        "tool_calls": [[call.call_id, call.name, call.arguments] for call in message.tool_calls],
        "call_id": message.call_id,
    }


def _tool_part(tool: Tool) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parameters": tool.parameters}


class AnswerCache:
    """One a process, for all tenants; bound to the loop that it is first used in.

    It closes neither the database nor the hot copies: they belong to whoever made them.
    """

    def __init__(
        self,
        database: Database,
        hot: HotAnswers | None = None,
        *,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._hot = hot
        self._lease_s = lease_s
        self._clock = clock
        self._flights: dict[Slot, asyncio.Future[ChatAnswer | None]] = {}
        self._held: set[Lease] = set()
        self._storing = Background()
        self._renewing: asyncio.Task[None] | None = None
        self._is_away = False
        self._rest_until = float("-inf")

    async def fetch(self, key: str, tenant_id: str, make: Make) -> tuple[ChatAnswer, bool]:
        """The answer of this key and whether it is a hit: whether somebody else's call made it.

        `make` asks the model and checks the answer. It runs in the task of one caller of all that
        ask at once. What it raises goes to that caller alone, nothing is stored, and one of the
        waiting makes the next call; it is the same when that caller is cancelled. Nothing is raised
        but what `make` raises.
        """
        slot = (tenant_id, key)
        while (flight := self._flights.get(slot)) is not None:
            # Shielded: a caller that is cancelled must not take the flight of the others along.
            if (found := await asyncio.shield(flight)) is not None:
                return found, True
        flight = self._flights[slot] = asyncio.get_running_loop().create_future()
        answer = None
        try:
            answer, is_hit = await self._find_or_make(slot, make)
        finally:
            del self._flights[slot]
            flight.set_result(answer)  # None: the first of the waiting makes the next flight
        return answer, is_hit

    async def aclose(self) -> None:
        """Store what is to be stored, and stop renewing. Callers have ended before."""
        await self.stored()
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)

    async def stored(self) -> None:
        """Until all answers that were given are stored, as far as they can be."""
        await self._storing.ended()

    async def _find_or_make(self, slot: Slot, make: Make) -> tuple[ChatAnswer, bool]:
        if (answer := await self._hot_copy(slot)) is not None:
            return answer, True
        lease = Lease(*slot, owner=secrets.token_hex(8))
        try:
            if (answer := await self._wait_for_answer(lease)) is not None:
                await self._heat(slot, answer)
                return answer, True
            answer = await make()
        except BaseException:
            await self._give_back(lease)
            raise
        # Beside the caller, who has its answer: others wait for it under our lease.
        self._storing.run(self._keep(lease, answer))
        return answer, False

    async def _wait_for_answer(self, lease: Lease) -> ChatAnswer | None:
        """The stored answer; None: make the call, by this lease or because Postgres is away."""
        pause_s = POLL_FIRST_S
        # Held before it is ours: a claim that is cut off may still be durable, and is given back.
        self._held.add(lease)
        with suppress(_AwayError):
            while True:
                found = await self._ask(look_or_claim, lease, self._lease_s)
                if isinstance(found, ChatAnswer):
                    self._held.discard(lease)
                    return found
                if found is Vacancy.OURS:
                    break
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, POLL_MAX_S)
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew(), name="llm-cache-renew")
        return None

    # --- leases -----------------------------------------------------------------------------------

    async def _renew(self) -> None:
        """All leases of this process in one statement, until it holds none."""
        while self._held:
            await asyncio.sleep(self._lease_s / 3)
            if self._held:
                with suppress(_AwayError):
                    await self._ask(renew, frozenset(self._held), self._lease_s)

    async def _keep(self, lease: Lease, answer: ChatAnswer) -> None:
        """Store the answer, also as a hot copy; where it can not be, others may ask anew."""
        try:
            if await self._store(lease, answer):
                await self._heat((lease.tenant_id, lease.cache_key), answer)
        finally:
            await self._give_back(lease)

    async def _store(self, lease: Lease, answer: ChatAnswer) -> bool:
        """Whether the answer is stored now, which ends the lease."""
        body = answer_to_json(answer)
        if body is None:
            return False
        with suppress(_AwayError):
            if await self._ask(store_answer, lease, body):
                self._held.discard(lease)
                return True
        return False

    async def _give_back(self, lease: Lease) -> None:
        """So that whoever waits need not wait for the end of the lease."""
        if lease in self._held:
            self._held.discard(lease)
            with suppress(_AwayError):
                await self._ask(give_back, lease)

    # --- the stores -------------------------------------------------------------------------------

    async def _ask(
        self,
        statement: Callable[Concatenate[Database, P], Awaitable[T]],
        *arguments: P.args,
        **options: P.kwargs,
    ) -> T:
        """One statement in Postgres. Raises `_AwayError`, whatever went wrong."""
        if self._clock() < self._rest_until:
            raise _AwayError
        try:
            async with asyncio.timeout(STATEMENT_S):
                found = await statement(self._database, *arguments, **options)
        except Exception as error:  # whatever the driver raises: the cache fails no run
            self._lose(error)
            raise _AwayError from error
        if self._is_away:
            self._is_away = False
            log.info("the database is back: answers of models are cached again")
        return found

    def _lose(self, error: Exception) -> None:
        self._rest_until = self._clock() + REST_S
        if not self._is_away:
            self._is_away = True
            log.warning(
                "the database is away (%s): models are called without the cache",
                type(error).__name__,
            )

    async def _hot_copy(self, slot: Slot) -> ChatAnswer | None:
        if self._hot is None:
            return None
        body = await self._hot.get(_hot_name(slot))
        return None if body is None else answer_from_json(body)

    async def _heat(self, slot: Slot, answer: ChatAnswer) -> None:
        """Make the hot copy of an answer that is stored."""
        if self._hot is not None and (body := answer_to_json(answer)) is not None:
            await self._hot.put(_hot_name(slot), body)


def _hot_name(slot: Slot) -> str:
    return ":".join(slot)
