"""A planner's model that says what a test wants it to, and the handshake that it leads to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.domain.chat import Completion, Prompt, PromptFailed
from app.domain.envelope import Envelope
from app.domain.event_shapes import EVENT_DATA
from app.domain.events import Event, EventType
from app.domain.plan import Plan
from app.planner.draft import PlanLimits
from app.planner.propose import propose_plan
from app.planner.replan import Progress
from app.registry.image import RegistryImage


class Models:
    """Answers planning prompts one after the other; keeps them."""

    def __init__(self, *answers: Mapping[str, Any] | Exception) -> None:
        self.answers = list(answers)
        self.prompts: list[Prompt] = []
        self.told: list[Event] = []

    async def complete(self, prompt: Prompt) -> Completion:
        self.prompts.append(prompt)
        found = self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        assert prompt.faults_of is not None
        if faults := prompt.faults_of(found):
            raise PromptFailed("schema_validation_failed", "no draft", faults=tuple(faults))
        return Completion("m", "", found)

    async def plan(
        self,
        made: Envelope,
        image: RegistryImage,
        progress: Progress | None = None,
    ) -> Plan:
        return await propose_plan(
            made,
            image,
            self.complete,
            self.told.append,
            run_id="r",
            created_at="now",
            limits=PlanLimits(),
            progress=progress,
        )

    def handshake(self) -> list[tuple[str, int, list[str]]]:
        """Type, attempt and codes of every event; each in its declared shape."""
        found = []
        for event in self.told:
            EVENT_DATA[EventType(event.type)].model_validate(event.data)
            codes = [fault["code"] for fault in event.data.get("diagnostics", ())]
            found.append((str(event.type), event.data["attempt"], codes))
        return found
