"""Following the events of a run over SSE: a reader after the standard, and a follower that lasts.

The follower takes up a dropped connection where it stood (`Last-Event-ID`), so that its caller
sees every event once and in order, however often the line breaks.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from app.cli.client import Api, path_of
from app.cli.errors import ApiProblem, Unreachable

TERMINAL = frozenset({"RUN_DONE", "RUN_FAILED", "RUN_CANCELLED"})
GAP = "gap"
"""Not an event: retention took `data.from` to `data.to`."""

PATIENCE_S = 120.0
RETRY_MAX_S = 5.0
RETRY_DEFAULT_MS = 2_000


@dataclass(frozen=True, slots=True)
class Message:
    """One dispatched message; `id` is the last event id at that moment."""

    event: str
    data: str
    id: str


class SseReader:
    """Server-Sent Events (WHATWG HTML 9.2.6), fed with bytes in any cut.

    What is unfinished when the bytes end is never dispatched, as the standard wants it.
    """

    def __init__(self) -> None:
        self.retry_ms = RETRY_DEFAULT_MS
        self._last_id = ""
        self._begun = False
        self._skip_lf = False
        self._rest = b""
        self._event = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[Message]:
        """The messages that are complete with this chunk."""
        if self._skip_lf and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._skip_lf = False
        if not chunk:
            return
        # A CR ends its line at once; should an LF follow in the next chunk, it belongs to it.
        self._skip_lf = chunk.endswith(b"\r")
        # Of bytes only: in a str, splitlines would also break at U+2028, which JSON may hold.
        lines = (self._rest + chunk).splitlines(keepends=True)
        self._rest = b"" if lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        for raw in lines:
            if not self._begun:
                self._begun = True
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            line = raw.rstrip(b"\r\n").decode("utf-8", "replace")
            if line:
                self._field(line)
            elif (message := self._dispatch()) is not None:
                yield message

    def restart(self) -> None:
        """A new connection begins: what was unfinished is gone, `retry` and the id stay."""
        self._begun = self._skip_lf = False
        self._rest, self._event, self._data = b"", "", []

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._last_id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry_ms = int(value)

    def _dispatch(self) -> Message | None:
        event, data = self._event, self._data
        self._event, self._data = "", []
        if not data:
            return None
        return Message(event or "message", "\n".join(data), self._last_id)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Filters of events; they combine. The terminal event passes every one."""

    types: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()

    def params(self) -> dict[str, list[str]]:
        """The same as query parameters."""
        return {"type": list(self.types), "node": list(self.nodes), "level": list(self.levels)}


EVERYTHING = Wanted()


class Follower:
    """The events of one run behind `seq`, each once, until the terminal one or the end of a run
    whose rest does not pass the filters.

    `say` gets a sentence for every break. Raises `Unreachable` when the service is not there for
    longer than `PATIENCE_S`, or at first, unless it `was_there` a moment ago.
    """

    def __init__(
        self,
        api: Api,
        run_id: str,
        *,
        after: int = 0,
        wanted: Wanted = EVERYTHING,
        was_there: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.seq = after
        self._api = api
        self._run_id = run_id
        self._wanted = wanted
        self._say = say
        self._reader = SseReader()
        self._tries = 0
        self._heard_at = time.monotonic() if was_there else None
        self._is_over = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while not self._is_over:
            reason = "the service ended the stream"
            try:
                yield from self._connection()
            except (Unreachable, ApiProblem) as lost:
                reason = self._passing(lost)
            if not self._is_over:
                self._pause(reason)

    def get(self, path: str) -> Any:
        """The JSON of a GET, as patient as with the events."""
        while True:
            try:
                found = self._api.get(path)
            except (Unreachable, ApiProblem) as lost:
                self._pause(self._passing(lost))
            else:
                self._tries = 0
                return found

    def _connection(self) -> Iterator[dict[str, Any]]:
        """Everything that one connection brings."""
        self._reader.restart()
        path = path_of("runs", self._run_id, "events")
        cursor = {"Last-Event-ID": str(self.seq)} if self.seq else {}
        with self._api.stream(path, self._wanted.params(), cursor) as chunks:
            self._heard_at = time.monotonic()
            if chunks is None:
                self._is_over = True
                return
            for message in self._messages(chunks):
                yield from self._take(message)
                if self._is_over:
                    return

    def _messages(self, chunks: Iterable[bytes]) -> Iterator[Message]:
        for chunk in chunks:
            self._heard_at = time.monotonic()
            yield from self._reader.feed(chunk)

    def _take(self, message: Message) -> Iterator[dict[str, Any]]:
        """The event of a message, unless it was seen before a break. Moves the cursor over it."""
        if message.event == GAP:
            data = json.loads(message.data)
            self.seq = max(self.seq, int(data["to"]))
            yield {"type": GAP, "data": data}
            return
        if message.event == "delta":
            return
        event: dict[str, Any] = json.loads(message.data)
        if event["seq"] <= self.seq:
            return
        self.seq = event["seq"]
        self._tries = 0
        self._is_over = event["type"] in TERMINAL
        yield event

    def _passing(self, lost: Unreachable | ApiProblem) -> str:
        """What is wrong for the moment. Raises when it is no use to wait for its end."""
        if isinstance(lost, ApiProblem) and lost.status != 503:
            raise lost
        if self._heard_at is None and isinstance(lost, Unreachable) and lost.refused:
            raise lost
        since = self._heard_at = self._heard_at or time.monotonic()
        if time.monotonic() - since > PATIENCE_S:
            raise Unreachable(
                lost.message, hint=f"Go on with: flexrun tail {self._run_id} -f --after {self.seq}"
            ) from None
        return lost.message

    def _pause(self, reason: str) -> None:
        """Back off from `retry`, with jitter: a service that restarts meets all its clients."""
        pause_s = min(self._reader.retry_ms / 1000 * 2**self._tries, RETRY_MAX_S)
        pause_s *= random.uniform(0.5, 1.0)
        self._tries += 1
        self._say(f"{reason.rstrip('.')}; going on behind event {self.seq} in {pause_s:.1f} s.")
        time.sleep(pause_s)
