"""Leaving in order: one flag that everything long-lived looks at."""

from __future__ import annotations

from collections.abc import Callable


class Drain:
    """Whether this process is leaving. `begin` tells everyone who asked to be told, once."""

    def __init__(self) -> None:
        self.is_draining = False
        self._listeners: list[Callable[[], None]] = []

    def on_begin(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def begin(self) -> None:
        if not self.is_draining:
            self.is_draining = True
            for listener in self._listeners:
                listener()
