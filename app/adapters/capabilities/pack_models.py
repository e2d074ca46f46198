"""Builtins that ask a model as they are told: `models.infer` and `models.embed`.

They are what the requests of `api/slm.py` run, and any plan may use them. A capability that has a
contract for its answer is better registered with kind `llm`.
"""

from __future__ import annotations

from typing import Any

from app.adapters.capabilities.builtin import Pack
from app.adapters.capabilities.llm import call_error
from app.domain.capability import Effect
from app.domain.chat import ChatRole, Message, ModelRole, Prompt, PromptFailed
from app.ports import Call

TIMEOUT_S = 300.0
"""For all tries of all models together: one that runs on a small machine takes its time."""

_NAMES: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
_ROLES = [role.value for role in ModelRole if role is not ModelRole.EMBEDDING]

MODELS_PACK = Pack("models")


@MODELS_PACK.capability(
    capability_id="models.infer",
    version="1.0.0",
    display_name="Ask a model",
    summary="Gives a prompt to a model and answers with its text.",
    input_schema={
        "type": "object",
        "properties": {
            "prompt": {"type": "string", "minLength": 1},
            "models": {**_NAMES, "description": "Preferred models, best first; others follow."},
            "role": {"enum": _ROLES},
            "output_tokens_max": {"type": "integer", "minimum": 1},
            "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        },
        "required": ["prompt"],
        "additionalProperties": False,
    },
    output_schema={
        "type": "object",
        "properties": {"model": {"type": "string"}, "output": {"type": "string"}},
        "required": ["model", "output"],
    },
    effect=Effect.PURE,
    cost_tier=5,
    timeout_s=TIMEOUT_S,
)
async def infer(call: Call) -> dict[str, Any]:
    """`{prompt, models?, role?, output_tokens_max?, temperature?}` -> `{model, output}`.

    Raises CallFailed with the code of `PromptFailed`, CallRefused while no breaker lets it through.
    """
    inputs = call.inputs
    prompt = Prompt(
        messages=(Message(ChatRole.USER, inputs["prompt"]),),
        role=ModelRole(inputs.get("role", ModelRole.CHAT)),
        output_tokens_max=inputs.get("output_tokens_max"),
        temperature=inputs.get("temperature"),
        preferred=tuple(inputs.get("models", ())),
    )
    try:
        completion = await call.complete(prompt)
    except PromptFailed as failed:
        raise call_error(failed) from None
    return {"model": completion.model, "output": completion.text}


@MODELS_PACK.capability(
    capability_id="models.embed",
    version="1.0.0",
    display_name="Embed a text",
    summary="Turns a text into the vector that a model makes of it.",
    input_schema={
        "type": "object",
        "properties": {
            "text": {"type": "string", "minLength": 1},
            "models": {**_NAMES, "description": "The only models that may make the vector."},
        },
        "required": ["text"],
        "additionalProperties": False,
    },
    output_schema={
        "type": "object",
        "properties": {
            "model": {"type": "string"},
            "embedding": {"type": "array", "items": {"type": "number"}},
            "dim": {"type": "integer"},
        },
        "required": ["model", "embedding", "dim"],
    },
    effect=Effect.PURE,
    cost_tier=1,
    timeout_s=TIMEOUT_S,
)
async def embed(call: Call) -> dict[str, Any]:
    """`{text, models?}` -> `{model, embedding, dim}`; raises what `infer` raises."""
    try:
        found = await call.embed(call.inputs["text"], call.inputs.get("models", ()))
    except PromptFailed as failed:
        raise call_error(failed) from None
    return {"model": found.model, "embedding": list(found.vector), "dim": len(found.vector)}
