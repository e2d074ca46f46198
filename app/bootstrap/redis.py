"""What processes share: by Redis where there is one, else each on its own or by the database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager

from app.adapters.breakers.local import LocalBreakers
from app.bootstrap.errors import NotReady
from app.journal.feed import Feed
from app.orchestrator.lease import Lease
from app.ports import Breakers, DeltaRelay, HotAnswers, Topic, WakeUps
from app.settings import Settings
from app.store.database import HotConnection
from app.store.notify import NotifyWakeUps


def open_wake_ups(
    settings: Settings,
    connect_here: Callable[[], Awaitable[HotConnection]],
    on_wake: Callable[[Topic], None],
    lease: Lease,
) -> WakeUps:
    """By Redis where there is one, else by the database itself."""

    def has_company() -> bool:
        return lease.has_company

    if settings.redis_url is None:
        return NotifyWakeUps(connect_here, on_wake=on_wake, has_company=has_company)
    from app.adapters.wake.redis import RedisWakeUps  # noqa: PLC0415 - only with a Redis

    with _redis_address():
        url = settings.redis_url.get_secret_value()
        return RedisWakeUps(url, on_wake=on_wake, has_company=has_company)


def open_delta_relay(
    settings: Settings, feed: Feed, lease: Lease, stack: AsyncExitStack
) -> DeltaRelay | None:
    """The way of deltas to other processes and from them; there is none without Redis."""
    if settings.redis_url is None:
        return None
    from app.adapters.wake.deltas import RedisDeltas  # noqa: PLC0415 - only with a Redis

    def has_listeners() -> bool:
        return feed.listeners > 0

    def has_company() -> bool:
        return lease.has_company

    with _redis_address():
        relay = RedisDeltas(
            settings.redis_url.get_secret_value(),
            hear=feed.tell,
            has_listeners=has_listeners,
            has_company=has_company,
            budget_s=settings.redis_budget_ms / 1000,
        )
    stack.push_async_callback(relay.aclose)
    feed.on_listener = relay.listen
    relay.start()
    return relay


def open_breakers(settings: Settings, lease: Lease) -> Breakers:
    """Shared by Redis where there is one, else this process's own."""

    def worker_id() -> str:
        return lease.worker_id

    threshold, cooldown_s = settings.cb_threshold, settings.cb_cooldown_s
    if settings.redis_url is None:
        return LocalBreakers(threshold=threshold, cooldown_s=cooldown_s, worker_id_of=worker_id)
    from app.adapters.breakers.redis import RedisBreakers  # noqa: PLC0415 - only with a Redis

    with _redis_address():
        return RedisBreakers(
            settings.redis_url.get_secret_value(),
            threshold=threshold,
            cooldown_s=cooldown_s,
            worker_id_of=worker_id,
            budget_s=settings.redis_budget_ms / 1000,
        )


def hot_answers(settings: Settings, stack: AsyncExitStack) -> HotAnswers | None:
    if settings.redis_url is None:
        return None
    from app.adapters.llm_cache.redis import RedisHotAnswers  # noqa: PLC0415 - only with a Redis

    with _redis_address():
        url = settings.redis_url.get_secret_value()
        hot = RedisHotAnswers(url, budget_s=settings.redis_budget_ms / 1000)
    stack.push_async_callback(hot.aclose)
    return hot


@contextmanager
def _redis_address() -> Iterator[None]:
    try:
        yield
    except ValueError:  # its text holds the address, and that holds a password
        raise NotReady(
            "REDIS_URL is no address of a Redis. It looks like redis://user:password@host:6379/0."
        ) from None
