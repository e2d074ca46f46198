"""How many tokens a call will have: counted by the model's own tokenizer, or by its characters.

It is known before the call and decides which models can take it; what a call did cost, the
vendor's usage says.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from app.domain.chat import Message, Tool

CHARS_PER_TOKEN = 4.0
"""Of English text. Source code has fewer, Russian about three, Chinese and Japanese about one."""
MARGIN_PERCENT = 5
"""For what vendors put around the texts: roles, separators, their own instructions for tools."""


class TokenizerUnusable(Exception):
    """A tokenizer file can not count. The text says why, without what the file holds."""


class TokenCounter(Protocol):
    """Counts the tokens of texts for a model; counters that are equal count alike."""

    def __call__(self, texts: Sequence[str]) -> int:
        """How many tokens these texts have together."""
        ...


@dataclass(frozen=True, slots=True)
class CharacterCounter:
    """Takes so many characters for one token, and rounds up."""

    chars_per_token: float = CHARS_PER_TOKEN

    def __call__(self, texts: Sequence[str]) -> int:
        return math.ceil(sum(map(len, texts)) / self.chars_per_token)


class FileCounter:
    """Counts as the `tokenizer.json` of a model does, in the format of Hugging Face.

    Raises `TokenizerUnusable` when the file can not be read or `tokenizers` is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._tokenizer = _tokenizer(path)

    def __call__(self, texts: Sequence[str]) -> int:
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return sum(len(encoding.ids) for encoding in encoded)


def _tokenizer(path: Path) -> Any:
    try:
        # Most catalogs count by characters, so the package is not among the requirements.
        library = importlib.import_module("tokenizers")
    except ImportError:
        raise TokenizerUnusable("a tokenizer file needs the package tokenizers") from None
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception:  # the library raises nothing more precise
        raise TokenizerUnusable("the tokenizer file can not be read") from None
    # Set in some files for the training of the model: then every long text would count the same.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def texts_of(
    messages: Iterable[Message],
    tools: Iterable[Tool] = (),
    schema: Mapping[str, Any] | None = None,
) -> tuple[str, ...]:
    """All texts that a call sends to the model, the tools and the schema as JSON."""
    texts = []
    for message in messages:
        texts.append(message.text)
        for call in message.tool_calls:
            texts += (call.name, call.arguments)
    for tool in tools:
        texts += (tool.name, tool.description, _json(tool.parameters))
    if schema is not None:
        texts.append(_json(schema))
    return tuple(texts)


def _json(value: Mapping[str, Any]) -> str:
    return orjson.dumps(value, default=dict).decode()


def projected(prompt_tokens: int, output_tokens: int) -> int:
    """The tokens that a call takes of a model's window: both, and 5 % more, rounded up."""
    return -(-(prompt_tokens + output_tokens) * (100 + MARGIN_PERCENT) // 100)
