"""Shapes of requests to models: what is asked, what comes back, and the record of each call."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from app.api.run_schemas import ErrorShape
from app.domain.chat import ModelRole

NAME_CHARS_MAX = 128

Name = Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)]
InferRole = Literal[ModelRole.CHAT, ModelRole.PLANNING, ModelRole.CODE, ModelRole.RELIABLE]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class InferPayload(_Shape):
    """A prompt. What is left out, the model decides."""

    prompt: str = Field(min_length=1)
    role: InferRole = Field(ModelRole.CHAT, description="What the model has to be good for.")
    output_tokens_max: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2)


class InferBody(InferPayload):
    """A prompt, and who should answer it."""

    model: Name | None = Field(
        None, description="Preferred; when it gives no answer, the next compatible one is asked."
    )


class EmbeddingPayload(_Shape):
    """A text to embed."""

    text: str = Field(min_length=1)


class EmbeddingBody(EmbeddingPayload):
    """A text, and who embeds it."""

    model: Name | None = Field(
        None,
        description="The only one that is asked: vectors of two models do not compare. Without "
        "it the cheapest that is there.",
    )


class _Queued(_Shape):
    provider: Name | None = Field(None, description="Prefer, or for embeddings take, its models.")
    model: Name | None = Field(None, description="As in the synchronous routes.")


class QueuedInfer(_Queued):
    mode: Literal["infer_sync"]
    payload: InferPayload


class QueuedEmbedding(_Queued):
    mode: Literal["embedding"]
    payload: EmbeddingPayload


class RequestBody(RootModel[Annotated[QueuedInfer | QueuedEmbedding, Field(discriminator="mode")]]):
    """A prompt or a text that a worker takes from the queue."""


class InferAnswer(_Shape):
    """`model` is the one that answered. `tokens_used`: of all calls that were made for it, in both
    directions; 0 for an answer that was known."""

    model: str
    output: str
    tokens_used: int


class EmbeddingAnswer(_Shape):
    """A vector of `dim` numbers, and the model that made it."""

    model: str
    embedding: list[float]
    dim: int


class RequestAccepted(_Shape):
    """`request_id` is the id of the run that does it."""

    request_id: str
    status: Literal["queued"]


class RequestResource(_Shape):
    """Where a request stands: `result` when it is completed, `error` when it failed."""

    request_id: str
    status: Literal["pending", "completed", "error"]
    result: InferAnswer | EmbeddingAnswer | None = None
    error: ErrorShape | None = None


class ModelCallRecord(_Shape):
    """One call of a model, as the journal has it. `refusal`: the model would not answer."""

    model_id: str
    provider: str
    role: str
    tenant_id: str
    tokens_in: int
    tokens_out: int
    latency_ms: float
    outcome: str = Field(description="`ok`, or why the call gave no usable answer.")
    refusal: bool
    run_id: str
    node_id: str | None = Field(description="Null for a call of the planner.")
    ts: str


class ModelCallList(_Shape):
    """A page of calls, newest run first. `next_cursor` is null at the end."""

    calls: list[ModelCallRecord]
    next_cursor: str | None


INFER_EXAMPLE: dict[str, Any] = {"prompt": "What grows on loam?", "output_tokens_max": 200}
EMBEDDING_EXAMPLE: dict[str, Any] = {"text": "oats on loam"}
REQUEST_EXAMPLE: dict[str, Any] = {"mode": "infer_sync", "payload": INFER_EXAMPLE}
