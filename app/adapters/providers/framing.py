"""Cutting a streamed body into its payloads, whatever pieces it comes in. Pure, no I/O.

A payload is the JSON text of one step of an answer. Whoever feeds the bytes bounds them.
"""

from __future__ import annotations

from typing import Protocol


class Framing(Protocol):
    """`feed` pieces of a body, then `end` once; both give the payloads that became whole."""

    def feed(self, piece: bytes) -> list[bytes]: ...

    def end(self) -> list[bytes]: ...


class _Lines:
    """Lines that end with LF or CRLF, without their end."""

    def __init__(self) -> None:
        self._open: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        first, *others = piece.split(b"\n")
        self._open.append(first)
        if not others:
            return []
        line = b"".join(self._open)
        self._open = [others.pop()]
        return [whole.removesuffix(b"\r") for whole in (line, *others)]

    def end(self) -> list[bytes]:
        """The line that nothing ended, if there is one."""
        line = b"".join(self._open)
        self._open = []
        return [line] if line else []


class JsonLines:
    """Newline-delimited JSON: every line is a payload. Blank lines mean nothing."""

    def __init__(self) -> None:
        self._lines = _Lines()

    def feed(self, piece: bytes) -> list[bytes]:
        return [line for line in self._lines.feed(piece) if line.strip()]

    def end(self) -> list[bytes]:
        return [line for line in self._lines.end() if line.strip()]


class EventStream:
    """Server-Sent Events (WHATWG HTML, 9.2.6): the payload of an event is its `data`.

    The other fields are left out: vendors repeat the name of an event in its payload. An event
    that the end of the body cuts off is given too, where the standard drops it: some servers leave
    out the last blank line, and what is really cut off is no JSON.
    """

    def __init__(self) -> None:
        self._lines = _Lines()
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        return [data for line in self._lines.feed(piece) for data in self._take(line)]

    def end(self) -> list[bytes]:
        return [data for line in (*self._lines.end(), b"") for data in self._take(line)]

    def _take(self, line: bytes) -> list[bytes]:
        """The payload of the event that this line ends, if it does."""
        if not line:
            data, self._data = self._data, []
            return [b"\n".join(data)] if data else []
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        return []
