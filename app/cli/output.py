"""The way to the terminal: every text goes out through here, without what could steer a terminal.

Texts of documents, capabilities and errors come from others. Control characters in them are
replaced, and nothing in them is taken for rich's markup.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

_CONTROLS = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
# What JSON does not escape by itself; inside of JSON these stand in strings only.
_JSON_CONTROLS = {code: f"\\u{code:04x}" for code in range(127, 160)}


@functools.cache
def console() -> Console:
    """Standard output."""
    return Console(highlight=False, markup=False, emoji=False)


def plain(text: str) -> str:
    """A text of others, harmless on a terminal."""
    return text.translate(_CONTROLS)


def out(text: str | Text = "") -> None:
    """Print a line as long as it is: a pipe gets it unbroken."""
    console().print(plain(text) if isinstance(text, str) else text, soft_wrap=True)


def err(text: str) -> None:
    """Print for people, beside the output."""
    print(plain(text), file=sys.stderr, flush=True)


def as_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON for people and programs alike."""
    found = json.dumps(value, ensure_ascii=False, indent=indent)
    return found.translate(_JSON_CONTROLS)


def out_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value as JSON and nothing else, whatever the width of the terminal."""
    print(as_json(value, indent=indent), flush=True)
