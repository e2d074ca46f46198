"""The slots of capabilities that limit how many of their calls run at once in a process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from app.domain.plan import PlanNode
from app.domain.state import CapabilityKey
from app.orchestrator.run import DrivenRun, Inbox


class Slots:
    """How many calls of a limited capability run in this process, and who waits for one.

    A slot is taken when a start is decided and given back when its call ended, so that two runs
    that decide at the same time can not both have the last one.
    """

    def __init__(self) -> None:
        self._used: dict[CapabilityKey, int] = {}
        self._limits: dict[CapabilityKey, int] = {}
        self._waiting: dict[CapabilityKey, dict[int, Inbox]] = {}

    def free(self, limits: Mapping[CapabilityKey, int]) -> dict[CapabilityKey, int]:
        return {key: limit - self._used.get(key, 0) for key, limit in limits.items()}

    def take(self, run: DrivenRun, node: PlanNode) -> None:
        if node.concurrency is not None:
            key = run.slots[node.id] = self._key(node)
            self._used[key] = self._used.get(key, 0) + 1

    def release(self, run: DrivenRun, node_id: str) -> None:
        """Give a slot back and let the run that waits longest look again."""
        if (key := run.slots.pop(node_id, None)) is not None:
            self._used[key] -= 1
            self._poke_next(key)

    def release_all(self, run: DrivenRun) -> None:
        """The run is not driven here any more."""
        for node_id in list(run.slots):
            self.release(run, node_id)
        for waiting in self._waiting.values():
            waiting.pop(id(run.inbox), None)
        self.pass_on()

    def wait(self, run: DrivenRun, node: PlanNode) -> None:
        """Poke the run when the node's capability has a free slot: at once, or later."""
        if node.concurrency is None:
            return
        key = self._key(node)
        self._waiting.setdefault(key, {})[id(run.inbox)] = run.inbox
        self._poke_next(key)

    @asynccontextmanager
    async def held(self, key: CapabilityKey, limit: int) -> AsyncIterator[None]:
        """A slot for a call that no plan knows of. It waits in the same line as runs do."""
        self._limits[key] = limit
        turn = Inbox()
        try:
            while self._used.get(key, 0) >= limit:
                self._waiting.setdefault(key, {})[id(turn)] = turn
                await turn.wait(None)
                turn.take()
        except BaseException:
            # It may have been woken just now: then the turn is the next one's.
            self._waiting.get(key, {}).pop(id(turn), None)
            self._poke_next(key)
            raise
        self._used[key] = self._used.get(key, 0) + 1
        try:
            yield
        finally:
            self._used[key] -= 1
            self._poke_next(key)

    def pass_on(self) -> None:
        """A run that was woken for a slot may not have taken it: the next in line looks."""
        for key in list(self._waiting):
            self._poke_next(key)

    def _poke_next(self, key: CapabilityKey) -> None:
        waiting = self._waiting.get(key)
        if waiting and self._used.get(key, 0) < self._limits[key]:
            waiting.pop(next(iter(waiting))).poke()
        if not waiting:
            self._waiting.pop(key, None)

    def _key(self, node: PlanNode) -> CapabilityKey:
        key = (node.capability_id, node.capability_version)
        assert node.concurrency is not None
        self._limits[key] = node.concurrency
        return key
