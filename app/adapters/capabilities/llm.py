"""The capability kind `llm`: a node is one prompt, answered by a model that the gateway picks.

    config: {"role": "chat", "temperature": 0, "output_tokens_max": 2000}    all optional

The system prompt comes from the contracts or from the owner (`domain/system_prompt.py`), the user's
message holds the objective, the instructions and the inputs as JSON. The answer is held to the
output contract; what breaks it is told to the model, which may try again. An output contract in
words (freeform) gives `{"text": …}`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.domain.capability import Capability
from app.domain.chat import AnswerForm, ChatRole, Message, ModelRole, Prompt, PromptFailed
from app.domain.errors import Fault
from app.domain.system_prompt import prompt_faults, system_prompt_of
from app.ports import Call, CallFailed, CallRefused


class LlmConfig(BaseModel):
    """What a registration may say about its calls; what it leaves out, the model decides."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: ModelRole = ModelRole.CHAT
    temperature: float | None = Field(default=None, ge=0, le=2)
    output_tokens_max: int | None = Field(default=None, ge=1, le=1_000_000)


class LlmAdapter:
    """Runs `llm` capabilities; everything about models is behind `Call.complete`."""

    def check(self, capability: Capability) -> list[Fault]:
        """Faults of the config, and of a system prompt that leaves an input or output out."""
        try:
            LlmConfig.model_validate(capability.registration.config)
        except ValidationError as error:
            return [
                Fault(
                    "CONFIG_INVALID",
                    found["msg"],
                    "/config/" + "/".join(map(str, found["loc"])),
                    capability_id=capability.capability_id,
                )
                for found in error.errors(include_url=False, include_input=False)
            ]
        return prompt_faults(capability)

    def inline(self, capability: Capability) -> None:
        """Never: every call waits for a model."""
        return

    def breaker_scope(self, capability: Capability, tenant_id: str) -> str | None:
        """None: breakers are those of the providers, which the gateway asks."""
        return None

    async def invoke(self, call: Call) -> dict[str, Any]:
        """The output of one prompt; raises `CallFailed` with the code of `PromptFailed`."""
        try:
            completion = await call.complete(_prompt_of(call))
        except PromptFailed as failed:
            raise call_error(failed) from None
        if call.capability.output.mode == "freeform":
            return {"text": completion.text}
        output: dict[str, Any] = completion.value
        return output


def call_error(failed: PromptFailed) -> CallFailed | CallRefused:
    """What a prompt without a usable answer means for the call that asked."""
    if failed.retry_after_s is not None:
        return CallRefused("llm", failed.retry_after_s)
    return CallFailed(
        failed.code,
        failed.message,
        retryable=False,  # the gateway has tried all that is worth trying
        target_failed=None,
        faults=failed.faults,
    )


def _prompt_of(call: Call) -> Prompt:
    capability = call.capability
    config = LlmConfig.model_validate(capability.registration.config)
    inputs = orjson.dumps(call.inputs, option=orjson.OPT_SORT_KEYS)
    parts = [f"Objective: {call.objective}"]
    if call.instructions.strip():
        parts.append(f"Instructions:\n{call.instructions}")
    parts.append(f"Inputs, as JSON:\n{inputs.decode()}")
    is_free = capability.output.mode == "freeform"
    return Prompt(
        messages=(
            Message(ChatRole.SYSTEM, system_prompt_of(capability)),
            Message(ChatRole.USER, "\n\n".join(parts)),
        ),
        role=config.role,
        form=AnswerForm.TEXT if is_free else AnswerForm.JSON,
        schema=None if is_free else capability.output.schema,
        output_tokens_max=config.output_tokens_max,
        temperature=config.temperature,
        preferred=tuple(capability.registration.preferred_models),
        faults_of=None if is_free else capability.output.violations,
        inputs_sha256=hashlib.sha256(inputs).hexdigest(),
    )
