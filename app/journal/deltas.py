"""Texts while they are said: from a call under way to the streams that follow its run just now.

    a model, a capability -> Speech, which joins pieces -> Feed -> streams of this process
                                                       -> DeltaRelay -> Feeds of others

Nothing of this is stored and nobody waits for it. The text as a whole is in the journal when the
call has ended, and until then a stream can do without any piece of it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Self
from uuid import UUID

from app.journal.feed import Feed
from app.journal.record import RunHandle
from app.ports import Delta, DeltaRelay

JOIN_S = 0.03
"""What is said within so long goes out as one delta."""
JOINED_CHARS_MAX = 65_536
"""What is said on top of that meanwhile is dropped."""


class Speech:
    """One text while it is said: a context of the loop's thread, that any thread may `add` to.

    `say` gets the number of a piece, from 1 on, and its text.
    """

    __slots__ = ("_chars", "_is_due", "_is_over", "_loop", "_lost", "_number", "_parts", "_say")

    def __init__(self, say: Callable[[int, str], None]) -> None:
        self._say = say
        self._loop = asyncio.get_running_loop()
        self._parts: deque[str] = deque()
        self._chars = 0
        self._number = 0
        self._lost = False
        self._is_due = False
        self._is_over = False

    def add(self, text: str) -> None:
        """The next words. Nothing happens when the text is over."""
        if self._is_over or not text:
            return
        self._lost = self._lost or self._chars + len(text) > JOINED_CHARS_MAX
        if not self._lost:
            self._chars += len(text)
            self._parts.append(text)
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon_threadsafe(self._wait)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Say what is left; not of a call that was cut off, whose end may be known already."""
        if kind is None:
            self._flush()
        self._is_over = True

    def _wait(self) -> None:
        self._loop.call_later(JOIN_S, self._flush)

    def _flush(self) -> None:
        if self._is_over:
            return
        # First of all, so that whoever adds from now on asks for the next flush.
        self._is_due = False
        self._chars = 0
        text = "".join([self._parts.popleft() for _ in range(len(self._parts))])
        if text:
            self._number += 1
            # A capability may say half a surrogate pair, which is no text to anybody else.
            self._say(self._number, text.encode(errors="replace").decode())
        if self._lost:  # behind what is said now, nothing until the next flush was kept
            self._lost = False
            self._number += 1


class Deltas:
    """Takes what the runs of this process say to whoever follows them."""

    def __init__(self, feed: Feed, relay: DeltaRelay | None = None) -> None:
        self._feed = feed
        self._relay = relay

    def speech(
        self, handle: RunHandle, node_id: str, attempt: int, call: int | None = None
    ) -> Speech:
        """A text that an attempt says; `call` as in `Delta`. Where it is left before the outcome is
        told, no piece of it comes behind the event of the outcome."""
        return Speech(partial(self._say, handle, node_id, attempt, call))

    @asynccontextmanager
    async def answer(
        self, handle: RunHandle, node_id: str, attempt: int, call: int
    ) -> AsyncIterator[Callable[[str], None] | None]:
        """Where a model's answer goes piece by piece while it is made; None when nobody follows the
        run, so that the model need not stream."""
        if not await self._are_wanted(handle.run_id):
            yield None
            return
        with self.speech(handle, node_id, attempt, call) as speech:
            yield speech.add

    async def _are_wanted(self, run_id: UUID) -> bool:
        if self._feed.has_listeners(run_id):
            return True
        return self._relay is not None and await self._relay.is_heard()

    def _say(
        self,
        handle: RunHandle,
        node_id: str,
        attempt: int,
        call: int | None,
        piece: int,
        text: str,
    ) -> None:
        delta = Delta(handle.run_id, handle.seq, node_id, attempt, call, piece, text)
        self._feed.tell(delta)
        if self._relay is not None:
            self._relay.send(delta)
