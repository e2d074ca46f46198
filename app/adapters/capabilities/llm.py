"""The capability kind `llm`: a node is one prompt, answered by a model that the gateway picks.

    config: {"role": "chat", "temperature": 0, "output_tokens_max": 2000,
             "tools": ["units.convert"], "tool_rounds_max": 8}               all optional

The system prompt comes from the contracts or from the owner (`domain/system_prompt.py`), the user's
message holds the objective, the instructions and the inputs as JSON. The answer is held to the
output contract; what breaks it is told to the model, which may try again. An output contract in
words (freeform) gives `{"text": …}`.

With `tools` (`domain/tools.py`) the model may call capabilities before it answers, several side by
side, for so many rounds: then an answer has to come, or the node fails (`tool_rounds_exhausted`).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.adapters.capabilities.llm_tools import Toolbox
from app.domain.capability import Capability
from app.domain.chat import (
    AnswerForm,
    ChatRole,
    Completion,
    Message,
    ModelRole,
    Prompt,
    PromptFailed,
)
from app.domain.errors import Fault
from app.domain.system_prompt import prompt_faults, system_prompt_of
from app.domain.tools import ToolRefs
from app.ports import Call, CallFailed, CallRefused

TOOL_ROUNDS_MAX = 8


class LlmConfig(BaseModel):
    """What a registration may say about its calls; what it leaves out, the model decides."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: ModelRole = ModelRole.CHAT
    temperature: float | None = Field(default=None, ge=0, le=2)
    output_tokens_max: int | None = Field(default=None, ge=1, le=1_000_000)
    tools: ToolRefs = []
    tool_rounds_max: int = Field(default=TOOL_ROUNDS_MAX, ge=1, le=32)


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
        config = LlmConfig.model_validate(call.capability.registration.config)
        toolbox = Toolbox(call, config.tools)
        try:
            completion = await _converse(call, config, toolbox)
        except (CallFailed, CallRefused) as failed:
            if toolbox.has_acted:
                raise _after_acting(failed) from None
            raise
        if call.capability.output.mode == "freeform":
            return {"text": completion.text}
        output: dict[str, Any] = completion.value
        return output


async def _converse(call: Call, config: LlmConfig, toolbox: Toolbox) -> Completion:
    """The prompt, and again with what the tools gave, until the model answers."""
    prompt = replace(_prompt_of(call, config), tools=toolbox.told())
    rounds = config.tool_rounds_max if prompt.tools else 0
    for rounds_left in reversed(range(rounds + 1)):
        try:
            completion = await call.complete(prompt)
        except PromptFailed as failed:
            raise call_error(failed) from None
        if not completion.tool_calls:
            return completion
        if rounds_left:
            told = await toolbox.answer(completion.text, completion.tool_calls)
            prompt = replace(prompt, messages=(*prompt.messages, *told))
    raise CallFailed(
        "tool_rounds_exhausted",
        f"The model asks for tools still, after {rounds} rounds of calls.",
        retryable=False,
        target_failed=None,
    )


def _after_acting(failed: CallFailed | CallRefused) -> CallFailed:
    """To wait and ask again would act again: a human decides, as on every unknown outcome."""
    code, text = "breaker_open", "No model could be asked any more."
    if isinstance(failed, CallFailed):
        code, text = failed.code, failed.message
    return CallFailed(
        code,
        f"{text} Tools that must not be called twice were called before.",
        retryable=False,
        unknown_outcome=True,
        target_failed=None,
    )


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


def _prompt_of(call: Call, config: LlmConfig) -> Prompt:
    capability = call.capability
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
