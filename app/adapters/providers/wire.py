"""What the wires of all vendors have in common: how answers are read, and what is built for them.

Shapes of answers are `Wire` models with the fields that we use; everything else in an answer is
passed over, so that a vendor can add to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from app.adapters.providers.failures import Garbage
from app.domain.chat import (
    AnswerForm,
    ChatRequest,
    Embeddings,
    LlmUnavailableError,
    StopReason,
    ToolCall,
    Usage,
)

Name = Annotated[str, StringConstraints(min_length=1)]


class Wire(BaseModel):
    """A part of a vendor's answer. Strict: a number in quotes is no number."""

    model_config = ConfigDict(
        strict=True, frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )


Shape = TypeVar("Shape", bound=Wire)


def read(shape: type[Shape], payload: bytes) -> Shape:
    """The payload as this shape; raises `Garbage` with the place and the kind of the fault."""
    try:
        return shape.model_validate_json(payload)
    except ValidationError as error:
        raise _garbage(error) from None


def part(shape: type[Shape], value: Any) -> Shape:
    """The same for a part whose shape depends on what else stands there."""
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        raise _garbage(error) from None


def _garbage(error: ValidationError) -> Garbage:
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(name) for name in fault["loc"])
    return Garbage(f"can not be read ({place or 'body'}: {fault['type']})")


class Pieces:
    """The text of an answer as it grows; each piece is told at once, where somebody listens."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text
        self._pieces: list[str] = []

    def add(self, piece: str | None) -> None:
        if piece:
            self._pieces.append(piece)
            self._on_text(piece)

    @property
    def text(self) -> str:
        return "".join(self._pieces)


def stop_of(
    reason: str | None, reasons: Mapping[str, StopReason], calls: Sequence[ToolCall]
) -> StopReason:
    """Our word for a vendor's; raises `Garbage` for one that is not in its documents.

    An answer with tool calls that ended well stopped for them, also where the vendor says only
    that it ended.
    """
    stop = reasons.get(reason or "")
    if stop is None:
        raise Garbage("does not say why it ended, or in an unknown word")
    if stop is StopReason.TOOLS and not calls:
        raise Garbage("stopped for tool calls and has none")
    return StopReason.TOOLS if calls and stop is StopReason.END else stop


def usage_of(tokens_in: object, tokens_out: object, tokens_cached: object = None) -> Usage | None:
    """The counts, or None where one is missing or can not be true; `tokens_cached` may be left out.

    Usage is worth having and never worth failing for.
    """
    into, out = count(tokens_in), count(tokens_out)
    cached = 0 if tokens_cached is None else count(tokens_cached)
    if into is None or out is None or cached is None or cached > into:
        return None
    return Usage(into, out, cached)


def count(value: object) -> int | None:
    """The value if it can be a number of tokens. A bool is an int to Python, and not to us."""
    return value if type(value) is int and value >= 0 else None


def embeddings_of(
    vectors: Sequence[Sequence[float]], texts: Sequence[str], usage: Usage | None
) -> Embeddings:
    """The vectors of these texts; raises `Garbage` when there is not one for each."""
    if len(vectors) != len(texts) or not all(vectors):
        raise Garbage("does not hold one vector for each text")
    return Embeddings(tuple(tuple(vector) for vector in vectors), usage)


def json_text(value: Any) -> str:
    """A JSON value as text, for vendors that give an object where we keep the model's text."""
    return orjson.dumps(value).decode()


def arguments_of(name: str, call: ToolCall) -> dict[str, Any]:
    """The other way round: the arguments of a call in the conversation, as an object.

    Raises `LlmUnavailableError` of the provider `name` where the model wrote something else.
    """
    try:
        arguments = orjson.loads(call.arguments)
    except orjson.JSONDecodeError:
        arguments = None
    if isinstance(arguments, dict):
        return arguments
    text = f"{name}: a tool call in the conversation has arguments that are no JSON object"
    raise LlmUnavailableError("provider_refused", text, retryable=False, target_failed=False)


# --- schemas --------------------------------------------------------------------------------------


def answer_schema(request: ChatRequest) -> dict[str, Any] | None:
    """The schema that the answer is to keep, None where none is asked for."""
    if request.form is not AnswerForm.JSON or request.schema is None:
        return None
    return dict(request.schema)


_STRICT_KEYWORDS = frozenset({"type", "title", "description", "enum", "const", "anyOf"}) | {
    *("properties", "required", "additionalProperties", "items")
}


def is_strict_schema(schema: Mapping[str, Any]) -> bool:
    """Whether vendors can hold a model to this schema, token by token.

    That is the part of JSON Schema which both OpenAI (structured outputs, `strict`) and Anthropic
    (`output_config.format`) document: objects are closed and need all their properties, and the
    keywords are few. They answer 400 to any other schema.
    """
    return schema.get("type") == "object" and "anyOf" not in schema and _is_strict(schema)


def _is_strict(schema: Any) -> bool:
    if not isinstance(schema, Mapping) or not schema.keys() <= _STRICT_KEYWORDS:
        return False
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    inner = list(schema.get("anyOf", []))
    if not kinds and not inner:
        return False
    if "array" in kinds:
        inner.append(schema.get("items"))
    if "object" in kinds:
        properties = schema.get("properties", {})
        is_closed = schema.get("additionalProperties") is False
        if not is_closed or set(properties) != set(schema.get("required", [])):
            return False
        inner.extend(properties.values())
    return not _has_nested_enum(schema) and all(_is_strict(part) for part in inner)


def _has_nested_enum(schema: Mapping[str, Any]) -> bool:
    values = [*schema.get("enum", []), schema.get("const")]
    return any(isinstance(value, (dict, list)) for value in values)
