"""The gateway: which model is asked how often, what is recorded, and what the caller is told."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from app.domain.budget import Spent
from app.domain.chat import (
    AnswerForm,
    ChatAnswer,
    ChatRole,
    ModelRole,
    Prompt,
    PromptFailed,
    StopReason,
)
from app.domain.envelope import Budget
from app.domain.errors import Fault
from app.domain.event_shapes import EVENT_DATA
from app.domain.events import EventType
from app.ports import Permit, TransitionKind
from tests.llm_kit import MODELS, Desk, answer, busy, refused, user

TEXT = Prompt(user("Say something."))
GOOD = answer('{"colour": "red"}')
BAD = answer('{"colour": 7}')


def _faults(value: Any) -> list[Fault]:
    if isinstance(value, dict) and isinstance(value.get("colour"), str):
        return []
    return [Fault("CONTRACT_TYPE", "7 is not of type string", "/colour")]


JSON = Prompt(
    user("A colour, please."),
    form=AnswerForm.JSON,
    schema={"type": "object", "properties": {"colour": {"type": "string"}}},
    faults_of=_faults,
)


async def test_a_call_is_recorded_with_its_choice_its_tokens_and_its_cost(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [answer("hello", 1_000, 500)])
    completion = await desk.gateway.complete(TEXT, desk.asker())
    assert (completion.text, completion.model) == ("hello", "small")
    assert desk.types() == ["MODEL_SELECTED", "LLM_REQUEST", "LLM_RESPONSE"]
    for event in desk.told:
        EVENT_DATA[EventType(event.type)].model_validate(event.data)
    assert desk.told[-1].data["cost_usd"] == "0.002"
    assert desk.account.spent == Spent(Decimal("0.002"), 1_500, 1)
    assert desk.account.held == Spent()


async def test_what_the_provider_did_not_count_is_projected(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [ChatAnswer("x" * 40, StopReason.END)])
    await desk.gateway.complete(TEXT, desk.asker())
    data = desk.told[-1].data
    assert (data["tokens_in"], data["tokens_out"], data["is_estimated"]) == (4, 10, True)


@pytest.mark.parametrize("first", [BAD, answer("No idea.")])
async def test_a_bad_answer_is_repaired_by_the_same_model(
    first: ChatAnswer, tmp_path: Path
) -> None:
    desk = Desk(tmp_path, [first, GOOD])
    completion = await desk.gateway.complete(JSON, desk.asker())
    assert (completion.value, completion.is_escalated) == ({"colour": "red"}, False)
    _, repair = desk.near.requests
    assert [message.role for message in repair.messages] == [
        *(ChatRole.USER, ChatRole.ASSISTANT, ChatRole.USER)
    ]
    assert repair.messages[1].text == first.text
    code = "invalid_json" if first is not BAD else "schema_validation_failed"
    assert desk.outcomes() == [("small", code), ("small", "ok")]


async def test_two_bad_answers_go_to_the_reliable_model_once(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [BAD], [GOOD])
    completion = await desk.gateway.complete(JSON, desk.asker())
    assert (completion.model, completion.is_escalated) == ("large", True)
    assert len(desk.near.requests) == 2
    assert len(desk.far.requests) == 1

    desk = Desk(tmp_path, [BAD], [BAD])
    with pytest.raises(PromptFailed) as failed:
        await desk.gateway.complete(JSON, desk.asker())
    assert failed.value.code == "schema_validation_failed"
    assert [fault.pointer for fault in failed.value.faults] == ["/colour"]
    assert (len(desk.near.requests), len(desk.far.requests)) == (2, 1)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (ChatAnswer("I will not.", StopReason.REFUSED), "refused"),
        (ChatAnswer('{"colour"', StopReason.LENGTH), "cut_off"),
    ],
)
async def test_what_no_repair_can_help_is_not_repaired(
    bad: ChatAnswer, code: str, tmp_path: Path
) -> None:
    desk = Desk(tmp_path, [bad])
    with pytest.raises(PromptFailed) as failed:
        await desk.gateway.complete(JSON, desk.asker())
    assert failed.value.code == code
    assert len(desk.near.requests) == 1
    assert bad.text not in str(failed.value)


@pytest.mark.parametrize("error", [busy(), TimeoutError()])
async def test_a_model_is_tried_three_times_and_then_the_next(
    error: Exception, tmp_path: Path
) -> None:
    desk = Desk(tmp_path, [error, error, error, answer("well")])
    completion = await desk.gateway.complete(TEXT, desk.asker())
    assert completion.model == "middle"
    assert len(desk.near.requests) == 4
    [_, selection] = [event for event in desk.told if event.type == "MODEL_SELECTED"]
    code = "timeout" if isinstance(error, TimeoutError) else "provider_busy"
    assert selection.data["rejected"] == [{"model": "small", "why": code}]
    assert selection.data["reason"] == "fallback"


async def test_what_no_retry_can_help_goes_to_the_next_model_at_once(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [refused(), answer("well")])
    assert (await desk.gateway.complete(TEXT, desk.asker())).model == "middle"
    assert len(desk.near.requests) == 2


async def test_nobody_waits_beyond_the_deadline(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [busy(retry_after_s=60), answer("well")])
    assert (await desk.gateway.complete(TEXT, desk.asker())).model == "middle"
    assert desk.outcomes() == [("small", "provider_busy"), ("middle", "ok")]


async def test_when_nobody_answers_the_last_reason_is_told(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [refused()], [refused()])
    with pytest.raises(PromptFailed) as failed:
        await desk.gateway.complete(TEXT, desk.asker())
    assert (failed.value.code, failed.value.message) == (
        "llm_unavailable",
        "Provider near answered 401.",
    )
    assert [model for model, _ in desk.outcomes()] == ["small", "middle", "large"]


async def test_a_prompt_that_no_model_can_take_is_not_sent(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [answer("never")])
    with pytest.raises(PromptFailed) as failed:
        await desk.gateway.complete(Prompt(user("x" * 500_000)), desk.asker())
    assert failed.value.code == "no_compatible_model"
    [selection] = desk.told
    assert [rejected["why"] for rejected in selection.data["rejected"]] == ["overflow"] * 3


async def test_a_prompt_that_is_too_long_for_the_cheapest_goes_to_the_next(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [answer("well")])
    assert (await desk.gateway.complete(Prompt(user("x" * 4_000)), desk.asker())).model == "middle"
    [selection] = [event for event in desk.told if event.type == "MODEL_SELECTED"]
    assert selection.data == {
        "chosen": "middle",
        "reason": "fallback",
        "role": "chat",
        "rejected": [{"model": "small", "why": "overflow"}],
    }


# --- breakers -------------------------------------------------------------------------------------


async def test_a_tripped_breaker_spares_all_models_of_its_provider(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [busy()], threshold=2)
    assert (await desk.gateway.complete(TEXT, desk.asker())).model == "large"
    assert len(desk.near.requests) == 2
    [tripped] = desk.heard
    assert (tripped.scope, tripped.kind) == ("llm::near", TransitionKind.TRIPPED)

    assert (await desk.gateway.complete(TEXT, desk.asker())).model == "large"
    assert len(desk.near.requests) == 2, "open: no request at all"
    assert len(desk.heard) == 1


async def test_when_all_breakers_are_open_the_caller_learns_when_to_come_back(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path, [busy()], [busy()], threshold=1)
    with pytest.raises(PromptFailed) as failed:
        await desk.gateway.complete(TEXT, desk.asker())
    assert failed.value.code == "breaker_open"
    assert failed.value.retry_after_s is not None
    assert 0 < failed.value.retry_after_s <= 30
    assert (len(desk.near.requests), len(desk.far.requests)) == (1, 1)


async def test_a_refused_key_does_not_open_the_breaker(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [refused()], [refused()], threshold=1)
    with pytest.raises(PromptFailed):
        await desk.gateway.complete(TEXT, desk.asker())
    assert desk.heard == []


async def test_a_call_that_is_cut_off_holds_nothing(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [answer("late")], threshold=1)
    desk.near.gate = asyncio.Event()
    asking = asyncio.create_task(desk.gateway.complete(TEXT, desk.asker()))
    await desk.near.called.wait()
    assert desk.account.held.calls == 1
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert desk.account.held == Spent()
    assert desk.account.spent == Spent()
    assert isinstance(await desk.breakers.allow("llm::near", "run:1", 1), Permit)


# --- budgets --------------------------------------------------------------------------------------


async def test_prompts_side_by_side_stay_within_the_budget(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [answer("well")], budget=Budget(calls=3))
    desk.near.gate = asyncio.Event()
    asking = [asyncio.create_task(desk.gateway.complete(TEXT, desk.asker())) for _ in range(10)]
    await desk.near.called.wait()
    desk.near.gate.set()
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert len(desk.near.requests) == 3
    refusals = [result for result in results if isinstance(result, PromptFailed)]
    assert [refusal.code for refusal in refusals] == ["budget_exhausted"] * 7
    exhausted = [event for event in desk.told if event.type == "BUDGET_EXHAUSTED"]
    assert [event.data for event in exhausted] == [
        {"resource": "calls", "limit": "3", "spent": "3"}
    ] * 7
    assert desk.account.spent.calls == 3


async def test_a_call_without_an_answer_is_a_call_here_and_after_a_take_over(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path, [busy()], budget=Budget(calls=2))
    with pytest.raises(PromptFailed) as failed:
        await desk.gateway.complete(TEXT, desk.asker())
    assert failed.value.code == "budget_exhausted"
    assert len(desk.near.requests) == len(desk.outcomes()) == desk.account.spent.calls == 2


@pytest.mark.parametrize("budget", [Budget(tokens=1_200), Budget(usd=Decimal("0.0005"))])
async def test_what_a_call_could_cost_has_to_fit(budget: Budget, tmp_path: Path) -> None:
    desk = Desk(tmp_path, [answer("well", 900, 100)], budget=budget)
    await desk.gateway.complete(TEXT, desk.asker())  # 204 tokens at most were held, for 0.000404
    with pytest.raises(PromptFailed) as failed:
        await desk.gateway.complete(TEXT, desk.asker())
    assert failed.value.code == "budget_exhausted"
    assert len(desk.near.requests) == 1


async def test_a_plan_is_bounded_so_that_a_budget_allows_a_model_that_could_write_books(
    tmp_path: Path,
) -> None:
    """All that a model could write, at its price, counts against the budget before it does."""
    verbose = MODELS.replace("ctx_window: 1000", "ctx_window: 200000")
    verbose = verbose.replace("output_tokens_max: 200", "output_tokens_max: 128000")
    verbose = verbose.replace("roles: [chat]", "roles: [chat, planning]", 1)
    desk = Desk(tmp_path, [GOOD], models=verbose, budget=Budget(tokens=20_000))
    completion = await desk.gateway.complete(replace(JSON, role=ModelRole.PLANNING), desk.asker())
    assert completion.value == {"colour": "red"}
    (request,) = desk.near.requests
    assert request.output_tokens_max == 16_000
