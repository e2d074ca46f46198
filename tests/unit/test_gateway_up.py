"""What the gateway knows of whether a prompt has a chance, without asking anybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.domain.chat import Prompt, PromptFailed
from app.llm import gateway as gateway_module
from tests.llm_kit import MODELS, Desk, Step, answer, busy, user

PROMPT = Prompt(messages=user("Hello"))


class Clock:
    """Stands in for the module `time` of the gateway."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(gateway_module, "time", clock)
    return clock


async def ask(desk: Desk) -> None:
    with pytest.raises(PromptFailed):
        await desk.gateway.complete(PROMPT, desk.asker())


def down() -> list[Step]:
    return [busy()]


async def test_it_is_up_until_it_knows_better(tmp_path: Path) -> None:
    desk = Desk(tmp_path, down(), down(), threshold=1)
    assert desk.gateway.is_up
    await ask(desk)
    assert not desk.gateway.is_up


async def test_one_provider_that_answers_is_enough(tmp_path: Path) -> None:
    desk = Desk(tmp_path, down(), [answer("far")], threshold=1)
    await desk.gateway.complete(PROMPT, desk.asker())
    assert desk.far.requests
    assert desk.gateway.is_up


async def test_it_may_be_up_again_when_the_breakers_let_a_call_through(
    tmp_path: Path, clock: Clock
) -> None:
    desk = Desk(tmp_path, down(), down(), threshold=1)
    await ask(desk)
    clock.now += 29
    assert not desk.gateway.is_up
    clock.now += 2
    assert desk.gateway.is_up


async def test_an_answer_is_the_end_of_it(tmp_path: Path, clock: Clock) -> None:
    desk = Desk(tmp_path, [busy(), answer("near")], down(), threshold=1)
    await ask(desk)
    assert not desk.gateway.is_up
    await desk.breakers.reset("llm::near")
    await desk.gateway.complete(PROMPT, desk.asker())
    assert desk.gateway.is_up


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("json_mode: true", "json_mode: false"),
        ("roles: [chat", "roles: [planning"),
        ("kind: openai, base_url:", "kind: openai, key_env: NOT_SET, base_url:"),
    ],
)
async def test_without_a_model_that_chats_in_json_it_is_never_up(
    tmp_path: Path, old: str, new: str
) -> None:
    assert not Desk(tmp_path, down(), models=MODELS.replace(old, new)).gateway.is_up


async def test_a_provider_whose_models_only_embed_does_not_count(tmp_path: Path) -> None:
    near, far = MODELS.split("  large:\n")
    large = far.replace("roles: [chat, reliable]", "roles: [planning]")
    desk = Desk(tmp_path, down(), threshold=1, models=f"{near}  large:\n{large}")
    await ask(desk)
    assert not desk.gateway.is_up
