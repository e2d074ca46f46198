"""A model call in the words of no vendor: what is asked of a model, and what came back.

`adapters/providers/` turn these into the requests of one vendor each and its answers back into
these. Texts here are prompts and answers: they go into no log line and no error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from app.domain.errors import Fault


class ChatRole(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What a model wants called. `arguments` is the JSON text exactly as the model wrote it."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `tool_calls` only of the assistant; `call_id` only of a tool: what it answers."""

    role: ChatRole
    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    call_id: str = ""


ANSWER_TOOL = "give_answer"
"""Not for others to use: a provider may ask for the answer itself as the input of such a tool."""


@dataclass(frozen=True, slots=True)
class Tool:
    """What a model may ask to be called. `parameters` is a JSON Schema of an object.

    `name` has at most 64 letters, digits, `_` and `-`, and is not `ANSWER_TOOL`.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]


class AnswerForm(StrEnum):
    """`json` asks for a JSON value, by the vendor's own switch where it has one."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One call. `model` is the vendor's name; what is None is left to the vendor.

    `schema` goes to vendors that hold a model to a JSON Schema, with `form` JSON only. `timeout_s`
    covers everything from the connection to the last byte.
    """

    model: str
    messages: tuple[Message, ...]
    timeout_s: float
    output_tokens_max: int | None = None
    temperature: float | None = None
    form: AnswerForm = AnswerForm.TEXT
    schema: Mapping[str, Any] | None = None
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the vendor counted them; `tokens_cached` are those of `tokens_in` that it had."""

    tokens_in: int
    tokens_out: int
    tokens_cached: int = 0


class StopReason(StrEnum):
    """Why the model stopped. `length`: the answer is cut off; `refused`: it would not answer."""

    END = "end"
    LENGTH = "length"
    TOOLS = "tools"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """What came back. `usage` is None where the vendor does not count."""

    text: str
    stop: StopReason
    usage: Usage | None = None
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector for each text, in the order of the texts."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage | None = None


class ModelRole(StrEnum):
    """What a model is used for. `reliable`: who is asked when others give bad answers."""

    CHAT = "chat"
    PLANNING = "planning"
    CODE = "code"
    EMBEDDING = "embedding"
    RELIABLE = "reliable"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is wanted of some model; which one, the gateway finds.

    `preferred` are names of the catalog, best first. `faults_of` judges the JSON value of an answer
    (`form` JSON): what it finds is told to the model, which may try again. `inputs_sha256` stands
    for data that the messages do not show, in the key of the cache.
    """

    messages: tuple[Message, ...]
    role: ModelRole = ModelRole.CHAT
    form: AnswerForm = AnswerForm.TEXT
    schema: Mapping[str, Any] | None = None
    tools: tuple[Tool, ...] = ()
    output_tokens_max: int | None = None
    temperature: float | None = None
    preferred: tuple[str, ...] = ()
    faults_of: Callable[[Any], Sequence[Fault]] | None = None
    inputs_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model made of a prompt. `value` is the JSON value of `text`, in form JSON only."""

    model: str
    text: str
    value: Any = None
    tool_calls: tuple[ToolCall, ...] = ()
    is_escalated: bool = False
    is_cached: bool = False


class PromptFailed(Exception):
    """No model gave a usable answer. `code`:

    `no_compatible_model`       none in the catalog can do it
    `breaker_open`              who could do it is not worth calling now: again in `retry_after_s`
    `timeout`                   the last that was asked did not answer in time
    `llm_unavailable`           the last that was asked gave no answer
    `invalid_json`, `schema_validation_failed`, `refused`, `cut_off`   it answered, but not well
    `budget_exhausted`          the run may not spend what the call could cost
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retry_after_s: float | None = None,
        faults: tuple[Fault, ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.faults = faults


class LlmUnavailableError(Exception):
    """A provider gave no usable answer; a time-out is Python's own `TimeoutError` instead.

    `code`: `provider_unreachable`, `provider_refused` (4xx), `provider_busy`
    (429), `provider_failed` (5xx), `provider_garbage` (an answer that can not be read). The text
    never quotes the request or the answer. `target_failed`: the provider is to blame, so its
    breaker counts it. `retry_after_s`: the provider's own wish.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retryable: bool,
        target_failed: bool,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.target_failed = target_failed
        self.status = status
        self.retry_after_s = retry_after_s
