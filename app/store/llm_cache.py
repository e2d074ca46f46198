"""Answers of models that may be given again, and the leases of the calls that make them.

For `llm/cache.py` and housekeeping. A row is one of two things: an answer (`body`), or the lease
(`owner`, `lease_until`) of the one caller that asks the model for it. Times are the database's. No
write here waits for the disk: what a crash of the server takes costs one more call.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from app.domain.chat import ChatAnswer, StopReason, ToolCall, Usage
from app.store.database import Database

BODY_FORMAT = 1
BODY_BYTES_MAX = 1_048_576
KEPT_STOPS = (StopReason.END, StopReason.TOOLS)
"""An answer that was cut off or refused is none to give again: the next call may do better."""
DELETED_AT_ONCE = 1_000

_LOOK_OR_CLAIM = """
    with found as (
        select body, last_used_day < current_date as was_used_before,
            lease_until < clock_timestamp() as lease_over
        from llm_answers
        where tenant_id = $1 and cache_key = $2
    ), ours as (
        insert into llm_answers
            (tenant_id, cache_key, owner, lease_until, created_at, last_used_day)
        select $1, $2, $3,
            clock_timestamp() + make_interval(secs => $4), clock_timestamp(), current_date
        where not exists (select from found where body is not null or not lease_over)
        on conflict (tenant_id, cache_key) do update
        set owner = excluded.owner, lease_until = excluded.lease_until,
            last_used_day = excluded.last_used_day
        where llm_answers.lease_until < clock_timestamp()
        returning true
    )
    select true as is_ours, null as body, null as was_used_before from ours
    union all
    select false, body, was_used_before from found
"""
_FORGET_UNREADABLE = "delete from llm_answers where tenant_id = $1 and cache_key = $2 and body = $3"
_NOTE_USE = """
    update llm_answers set last_used_day = current_date where tenant_id = $1 and cache_key = $2
"""
_RENEW = """
    update llm_answers set lease_until = clock_timestamp() + make_interval(secs => $4)
    from unnest($1::text[], $2::text[], $3::text[]) as held (tenant_id, cache_key, owner)
    where llm_answers.tenant_id = held.tenant_id and llm_answers.cache_key = held.cache_key
        and llm_answers.owner = held.owner
"""
_STORE = """
    update llm_answers set body = $4, owner = null, lease_until = null,
        created_at = clock_timestamp(), last_used_day = current_date
    where tenant_id = $1 and cache_key = $2 and owner = $3
    returning true
"""
_GIVE_BACK = "delete from llm_answers where tenant_id = $1 and cache_key = $2 and owner = $3"
_FORGET_OLD = """
    with gone as (
        delete from llm_answers where (tenant_id, cache_key) in (
            select tenant_id, cache_key from llm_answers
            where last_used_day < current_date - $1::int limit $2
        )
        returning true
    )
    select count(*) from gone
"""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to make the call for one answer. `owner` is one caller, and never used again."""

    tenant_id: str
    cache_key: str
    owner: str


class Vacancy(StrEnum):
    """Why there is no answer: the call is ours to make, or somebody else makes it."""

    OURS = "ours"
    TAKEN = "taken"


async def look_or_claim(database: Database, lease: Lease, lease_s: float) -> ChatAnswer | Vacancy:
    """The stored answer, else the lease where none runs, in one round trip.

    An answer counts as used; one that can not be read is deleted, and whoever asks next may claim.
    """
    async with database.relaxed() as connection:
        rows = await connection.fetch(_LOOK_OR_CLAIM, *_place_of(lease), lease_s)
        if any(row["is_ours"] for row in rows):
            return Vacancy.OURS
        if not rows or rows[0]["body"] is None:
            return Vacancy.TAKEN
        answer = answer_from_json(rows[0]["body"])
        if answer is None:
            await connection.execute(
                _FORGET_UNREADABLE, lease.tenant_id, lease.cache_key, rows[0]["body"]
            )
            return Vacancy.TAKEN
        if rows[0]["was_used_before"]:  # at most one write a day, however often it is used
            await connection.execute(_NOTE_USE, lease.tenant_id, lease.cache_key)
    return answer


async def renew(database: Database, leases: Collection[Lease], lease_s: float) -> None:
    """Let these leases run on. One that somebody else took over meanwhile stays theirs."""
    held = [
        [lease.tenant_id for lease in leases],
        [lease.cache_key for lease in leases],
        [lease.owner for lease in leases],
    ]
    async with database.relaxed() as connection:
        await connection.execute(_RENEW, *held, lease_s)


async def store_answer(database: Database, lease: Lease, body: bytes) -> bool:
    """Put the answer in the place of the lease. False: somebody else has taken the lease over."""
    async with database.relaxed() as connection:
        return bool(await connection.fetchval(_STORE, *_place_of(lease), body))


async def give_back(database: Database, lease: Lease) -> None:
    """End the lease without an answer. Does nothing when it is not ours, or not any more."""
    async with database.relaxed() as connection:
        await connection.execute(_GIVE_BACK, *_place_of(lease))


async def forget_old_answers(database: Database, days: int) -> int:
    """Delete what was not used for more than `days` days, in steps; how many rows went.

    With 0, which is a cache that is turned off, everything of the days before today.
    """
    deleted = 0
    while True:
        async with database.relaxed() as connection:
            gone: int = await connection.fetchval(_FORGET_OLD, days, DELETED_AT_ONCE)
        deleted += gone
        if gone < DELETED_AT_ONCE:
            return deleted


def _place_of(lease: Lease) -> tuple[str, str, str]:
    return lease.tenant_id, lease.cache_key, lease.owner


# --- an answer as JSON ----------------------------------------------------------------------------


def answer_to_json(answer: ChatAnswer) -> bytes | None:
    """The stored form; None for what is not stored: not whole, not Unicode, or too large."""
    if answer.stop not in KEPT_STOPS:
        return None
    usage = answer.usage
    value = {
        "format": BODY_FORMAT,
        "text": answer.text,
        "stop": answer.stop.value,
        "usage": None
        if usage is None
        else {
            "tokens_in": usage.tokens_in,
            "tokens_out": usage.tokens_out,
            "tokens_cached": usage.tokens_cached,
        },
        "tool_calls": [
            {"call_id": call.call_id, "name": call.name, "arguments": call.arguments}
            for call in answer.tool_calls
        ],
    }
    try:
        body = orjson.dumps(value)
    except orjson.JSONEncodeError:  # half a surrogate pair
        return None
    return body if len(body) <= BODY_BYTES_MAX else None


def answer_from_json(body: bytes) -> ChatAnswer | None:
    """The answer of a stored form; None for what can not be read, which is a miss."""
    try:
        value = orjson.loads(body)
        if value["format"] != BODY_FORMAT:
            return None
        return ChatAnswer(
            text=_text(value["text"]),
            stop=StopReason(value["stop"]),
            usage=_usage(value["usage"]),
            tool_calls=tuple(map(_tool_call, value["tool_calls"])),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _usage(value: Any) -> Usage | None:
    if value is None:
        return None
    return Usage(
        _count(value["tokens_in"]), _count(value["tokens_out"]), _count(value["tokens_cached"])
    )


def _tool_call(value: Any) -> ToolCall:
    return ToolCall(_text(value["call_id"]), _text(value["name"]), _text(value["arguments"]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError
    return value
