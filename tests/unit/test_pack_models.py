"""`models.infer` and `models.embed`: what they ask, and what a failure means for their node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from app.adapters.capabilities.builtin import BuiltinAdapter
from app.adapters.capabilities.pack_models import MODELS_PACK
from app.api.slm_runs import EMBED, INFER, Work
from app.domain.capability import Effect
from app.domain.chat import ChatRole, Completion, Message, ModelRole, Prompt, PromptFailed
from app.domain.envelope import Lane
from app.domain.plan import Fit
from app.planner.plan_envelope import plan_envelope
from app.ports import Call, CallFailed, CallRefused, Embedded
from app.registry.image import RegistryImage
from tests.capability_samples import call_of, compiled

CAPABILITIES = {found.capability_id: compiled(found) for found in MODELS_PACK.registrations()}
IMAGE = RegistryImage.build(1, [], CAPABILITIES.values())
ADAPTER = BuiltinAdapter([MODELS_PACK])
FULL = {
    "prompt": "What grows on loam?",
    "models": ["small", "large"],
    "role": "code",
    "output_tokens_max": 50,
    "temperature": 0.5,
}


def asking(
    capability_id: str, inputs: dict[str, Any], failure: PromptFailed | None = None
) -> tuple[Call, list[Any]]:
    """A call, and what it will have asked; a model answers, or fails like this."""
    asked: list[Any] = []

    async def complete(prompt: Prompt) -> Completion:
        asked.append(prompt)
        if failure is not None:
            raise failure
        return Completion("small", "oats")

    async def embed(text: str, models: Sequence[str] = ()) -> Embedded:
        asked.append((text, list(models)))
        if failure is not None:
            raise failure
        return Embedded("vectors", (0.5, 0.25))

    capability = CAPABILITIES[capability_id]
    assert capability.input.violations(inputs) == []
    return replace(call_of(capability, inputs), complete=complete, embed=embed), asked


async def test_a_prompt_is_sent_as_it_was_given() -> None:
    call, asked = asking(INFER, FULL)
    output = await ADAPTER.invoke(call)
    assert output == {"model": "small", "output": "oats"}
    assert call.capability.output.violations(output) == []
    assert asked == [
        Prompt(
            messages=(Message(ChatRole.USER, "What grows on loam?"),),
            role=ModelRole.CODE,
            output_tokens_max=50,
            temperature=0.5,
            preferred=("small", "large"),
        )
    ]


async def test_a_text_becomes_a_vector_with_its_size() -> None:
    call, asked = asking(EMBED, {"text": "loam", "models": ["vectors"]})
    output = await ADAPTER.invoke(call)
    assert output == {"model": "vectors", "embedding": [0.5, 0.25], "dim": 2}
    assert call.capability.output.violations(output) == []
    assert asked == [("loam", ["vectors"])]


@pytest.mark.parametrize(
    ("capability_id", "inputs"), [(INFER, {"prompt": "x"}), (EMBED, {"text": "x"})]
)
async def test_a_failure_fails_the_node_and_an_open_breaker_lets_it_wait(
    capability_id: str, inputs: dict[str, Any]
) -> None:
    call, _ = asking(capability_id, inputs, PromptFailed("refused", "It would not answer."))
    with pytest.raises(CallFailed) as failed:
        await ADAPTER.invoke(call)
    assert (failed.value.code, failed.value.retryable) == ("refused", False)

    call, _ = asking(capability_id, inputs, PromptFailed("breaker_open", "Later.", retry_after_s=7))
    with pytest.raises(CallRefused) as refused:
        await ADAPTER.invoke(call)
    assert refused.value.retry_after_s == 7


async def test_without_a_gateway_there_is_no_model() -> None:
    for capability_id, inputs in ((INFER, {"prompt": "x"}), (EMBED, {"text": "x"})):
        with pytest.raises(CallFailed) as failed:
            await ADAPTER.invoke(call_of(CAPABILITIES[capability_id], inputs))
        assert failed.value.code == "no_compatible_model"


@pytest.mark.parametrize("wrong", [{}, {"prompt": ""}, {**FULL, "role": "embedding"}])
def test_inputs_are_held_to_the_contract(wrong: dict[str, Any]) -> None:
    assert CAPABILITIES[INFER].input.violations(wrong) != []


@pytest.mark.parametrize("work", [Work(INFER, FULL), Work(EMBED, {"text": "loam", "models": []})])
def test_a_request_is_a_run_of_one_node_that_repeats_no_prompt(work: Work) -> None:
    envelope = work.envelope(Lane.INTERACTIVE, 30)
    plan = plan_envelope(envelope, IMAGE, run_id="r", created_at="2026-01-01T00:00:00.000Z")
    [node] = plan.nodes.values()
    assert (node.capability_id, node.timeout_s, node.effect) == (
        work.capability_id,
        30,
        Effect.PURE,
    )
    assert {step.fit for step in plan.proof} <= {Fit.SAME_FACET, Fit.SUBSUMED}
    assert "loam" not in envelope.objective
    assert "loam" not in repr(plan.nodes)
    assert envelope.inputs == work.inputs
