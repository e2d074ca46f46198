"""Clients that never give up: they submit, follow, reconnect elsewhere, answer and meddle.

Everything they are told goes into the `ClientLog`, and nothing else is done with it: what it is
worth the checker says. A POST carries an Idempotency-Key and is repeated until it is answered; a
stream that breaks is continued at any address with Last-Event-ID. An answer that the API does not
promise (500, a 503 that is no problem document …) is noted and tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson

from tests.chaos.history import (
    TERMINAL,
    WAITING,
    BadAnswer,
    ClientLog,
    Connection,
    Post,
    SentSignal,
)
from tests.chaos.wire import Answer, Broken, Exchange, WireEvent, ask
from tests.chaos.workload import STAGES, Meddling, Order

PAUSE_S = 0.1
PAUSE_MAX_S = 1.0
UNSURE_S = 2.0
BY_HAND = {"by": "hand", **{stage: {} for stage in STAGES}}
"""An output that fits every tool of the suite."""


class Clients:
    """All clients of a scenario. `addresses` gives the ports at which an API may answer now."""

    def __init__(self, addresses: Callable[[], list[int]], seed: int) -> None:
        self.log = ClientLog()
        self.submitted = 0
        self.finished = 0
        self._addresses = addresses
        self._random = random.Random(f"{seed}:clients")

    def _anywhere(self) -> int:
        return self._random.choice(self._addresses())

    async def live(self, order: Order) -> None:
        """One run from its first POST to its end, whatever happens on the way."""
        follower = Follower(self, order)
        if order.by_stream:
            await follower.submit_as_stream()
        async with asyncio.TaskGroup() as group:
            posts = [group.create_task(self.submit(order)) for _ in range(order.posts)]
        if (run_id := posts[0].result()) is not None:
            await follower.follow(run_id)
        self.finished += 1

    async def follow(self, order: Order, run_id: str) -> None:
        """The stream of a run that was submitted, to its end."""
        await Follower(self, order).follow(run_id)

    def post_of(self, order: Order) -> Post:
        """Where the answers to this order's key are logged."""
        if order.key not in self.log.posts:
            self.submitted += 1
        return self.log.posts.setdefault(order.key, Post(order.key, order.kind))

    async def submit(self, order: Order) -> str | None:
        """POST until it is answered 2xx; None when the envelope is refused for good."""
        post = self.post_of(order)
        headers = {"Idempotency-Key": order.key}
        answer = await self.insist("POST", "/v1/runs", order.envelope, headers)
        post.statuses.append(answer.status)
        if answer.status not in (200, 202):
            self._bad("POST", "/v1/runs", answer)
            return None
        run_id: str = answer.json["run_id"]
        post.run_ids.append(run_id)
        return run_id

    async def insist(
        self, method: str, path: str, content: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Ask one address after the other until one gives an answer that is not a 5xx."""
        pause = PAUSE_S
        while True:
            try:
                answer = await ask(self._anywhere(), method, path, content, headers)
            except Broken:
                pass
            else:
                if answer.status < 500:
                    return answer
                self._unavailable(method, path, answer)
            await asyncio.sleep(pause * self._random.uniform(0.5, 1.5))
            pause = min(pause * 2, PAUSE_MAX_S)

    def _unavailable(self, method: str, path: str, answer: Answer) -> None:
        """A 503 has to be a problem that says when to come again; every other 5xx is a fault."""
        self.log.unavailable += 1
        if answer.status != 503 or not answer.is_problem or "retry-after" not in answer.headers:
            self._bad(method, path, answer)

    def _bad(self, method: str, path: str, answer: Answer) -> None:
        what = answer.body[:300].decode(errors="replace")
        self.log.bad_answers.append(BadAnswer(method, path, answer.status, what))

    async def signal(
        self, run_id: str, kind: str, body: dict[str, Any], *, twice: bool
    ) -> str | None:
        """Send a signal, perhaps twice under one key; the new run, if that is what it made.

        409 says that it came too late, and so do some 422: a run moves while its operator decides.
        """
        key = f"{kind}-{self._random.getrandbits(48):x}"
        successor: str | None = None
        for _ in range(2 if twice else 1):
            path = f"/v1/runs/{run_id}/{kind}"
            answer = await self.insist("POST", path, body, {"Idempotency-Key": key})
            if answer.status == 202 and answer.json["signal_id"] is None:
                successor = answer.json["run_id"]
            elif answer.status == 202:
                signal_id = answer.json["signal_id"]
                sent = SentSignal(run_id, kind, key, signal_id, time.monotonic())
                self.log.signals.append(sent)
            elif answer.status != 409 and not _came_too_late(answer):
                self._bad("POST", path, answer)
        return successor

    def exchange(self) -> Exchange:
        """A connection to any address."""
        return Exchange(self._anywhere())

    def connection(self, run_id: str, after: int) -> Connection:
        """Where a stream that was opened is logged."""
        connection = Connection(run_id, after)
        self.log.connections.append(connection)
        return connection

    def refused(self, method: str, path: str, answer: Answer) -> None:
        """A stream that was not opened."""
        if answer.status >= 500:
            self._unavailable(method, path, answer)
        else:
            self._bad(method, path, answer)

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def choose(self, options: list[str]) -> str:
        return self._random.choice(options)


class Follower:
    """One run's client: reads its stream to the end, and is its operator as well."""

    def __init__(self, clients: Clients, order: Order) -> None:
        self._clients = clients
        self._order = order
        self._run_id = ""
        self._last = 0
        self._seen = 0
        self._breaks = list(order.breaks)
        self._meddled = order.meddling in (Meddling.NOTHING, Meddling.NEVER_ANSWER)
        self._paused: dict[str, Any] | None = None
        self._is_over = False
        self._successors: list[str] = []

    async def submit_as_stream(self) -> None:
        """POST once and read the stream that answers it, as far as it goes. The POST is repeated
        for its answer later on: what this one said has to be the same."""
        headers = {"Idempotency-Key": self._order.key, "Accept": "text/event-stream"}
        post = self._clients.post_of(self._order)
        async with self._clients.exchange() as exchange:
            try:
                await exchange.send("POST", "/v1/runs", self._order.envelope, headers)
                if exchange.status != 200:
                    self._clients.refused("POST", "/v1/runs", await exchange.answer())
                    return
                self._run_id = exchange.headers["location"].rpartition("/")[2]
                post.run_ids.append(self._run_id)
                await self._read(exchange, self._clients.connection(self._run_id, 0))
            except Broken:
                pass

    async def follow(self, run_id: str) -> None:
        """Until the terminal event was seen, or nobody is going to answer the run's question."""
        self._run_id = run_id
        pause = PAUSE_S
        while not self._is_over:
            before = self._last
            with contextlib.suppress(Broken):
                await self._read_once()
            pause = PAUSE_S if self._last > before else min(pause * 2, PAUSE_MAX_S)
            if not self._is_over:
                await asyncio.sleep(pause)
        for successor in self._successors:
            await self._clients.follow(self._order, successor)

    async def _read_once(self) -> None:
        """One connection, from the last seq that was seen."""
        path = f"/v1/runs/{self._run_id}/events"
        headers = {"Accept": "text/event-stream"}
        if self._last:
            headers["Last-Event-ID"] = str(self._last)
        async with self._clients.exchange() as exchange:
            await exchange.send("GET", path, None, headers)
            if exchange.status == 204:
                self._clients.connection(self._run_id, self._last).ended = "204"
                self._is_over = True
            elif exchange.status != 200:
                self._clients.refused("GET", path, await exchange.answer())
            else:
                await self._read(exchange, self._clients.connection(self._run_id, self._last))

    async def _read(self, exchange: Exchange, connection: Connection) -> None:
        until = self._breaks.pop() if self._breaks else None
        events = exchange.events()
        upcoming = _upcoming(events)
        try:
            while True:
                done, _ = await asyncio.wait({upcoming}, timeout=UNSURE_S)
                if not done:
                    await self._answer_pause()  # an answer that came too early is given again
                    continue
                event = upcoming.result()
                self._take(event, connection)
                if connection.saw_terminal:
                    self._is_over = True
                    return
                await self._act(event)
                if self._is_over or (until is not None and len(connection.seqs) >= until):
                    return
                upcoming = _upcoming(events)
        except StopAsyncIteration:
            connection.ended = "end"
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
            await events.aclose()

    def _take(self, event: WireEvent, connection: Connection) -> None:
        if event.id is None:
            connection.gaps += event.event == "gap"
            return
        self._clients.log.saw(connection, event.id, event.data)
        self._last = max(self._last, event.id)
        self._seen += 1
        connection.saw_terminal = event.event in TERMINAL

    async def _act(self, event: WireEvent) -> None:
        """What the operator does about this event."""
        if event.event == "RUN_PAUSED":
            self._paused = orjson.loads(event.data)["data"]
            await self._answer_pause()
        elif event.event == "RUN_RESUMED":
            self._paused = None
        elif not self._meddled and self._seen >= self._order.meddle_after:
            self._meddled = True
            body = {"operator": self._order.operator, "note": "as planned"}
            kind = self._order.meddling.value
            twice = self._clients.chance(0.3)
            await self._clients.signal(self._run_id, kind, body, twice=twice)

    async def _answer_pause(self) -> None:
        """Resume a paused run; decide what waits for a decision, unless nobody ever will."""
        if self._paused is None:
            return
        run = await self._clients.insist("GET", f"/v1/runs/{self._run_id}")
        if run.json["status"] not in WAITING:
            return
        waiting = [
            node["node_id"]
            for node in run.json.get("nodes", ())
            if node.get("reason") == "unknown_outcome"
        ]
        if waiting and self._order.meddling is Meddling.NEVER_ANSWER:
            self._clients.log.left_waiting.add(self._run_id)
            self._is_over = True
            return
        body: dict[str, Any] = {"operator": self._order.operator, "note": "go on"}
        if waiting:
            body["nodes"] = {node_id: self._decision() for node_id in waiting}
        twice = self._clients.chance(0.2)
        successor = await self._clients.signal(self._run_id, "resume", body, twice=twice)
        if successor is not None and successor not in self._successors:
            self._successors.append(successor)  # it was cancelled, or failed, just before

    def _decision(self) -> dict[str, Any]:
        decision = self._clients.choose(["done", "retry", "retry", "fail"])
        return {"decision": decision} | ({"output": BY_HAND} if decision == "done" else {})


def _came_too_late(answer: Answer) -> bool:
    """The nodes that wait for a decision are others by now, or the run is over."""
    faults = answer.json.get("errors") or [{}] if answer.is_problem else [{}]
    return {fault.get("code") for fault in faults} <= {"DECISION_MISSING", "NODE_NOT_WAITING"}


def _upcoming(events: AsyncGenerator[WireEvent, None]) -> asyncio.Future[WireEvent]:
    """The next event, to be waited for in pieces."""
    return asyncio.ensure_future(anext(events))
