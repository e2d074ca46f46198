"""Planning by a model, beside the loop of the run: it takes seconds, and signals must be heard.

The handshake is told to the journal as it goes; the finished plan comes to the loop as one item,
which its next append makes durable. A process that dies in the middle loses the calls, not the run.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from app.domain.decide import deadline_at
from app.domain.errors import PlanRejected
from app.domain.events import Event
from app.kit.clock import now_ms
from app.kit.rfc3339 import rfc3339
from app.llm.gateway import Gateway
from app.orchestrator.ask import asker_of
from app.orchestrator.run import PLANNING, DrivenRun, Planned, Said
from app.planner.goals import is_open
from app.planner.plan_envelope import PlanLimits
from app.planner.propose import propose_plan
from app.planner.replan import progress_of
from app.registry.image import RegistryImage

PLANNING_S = 300.0
"""For all calls of models together; a run with a nearer deadline has less."""


@dataclass(frozen=True, slots=True)
class ModelPlanner:
    """Plans the envelopes that ask for it (`policies.planner.strategy`), and chooses who does the
    goals of a graph that names no capabilities."""

    gateway: Gateway
    limits: PlanLimits

    def takes(self, run: DrivenRun) -> bool:
        """Whether the next plan of this run is a model's. A goal graph that names its capabilities
        is a plan already, but what takes its place may be one."""
        graph = run.envelope.goal_graph
        if graph is not None and (is_open(graph) or run.state.plan is None):
            return is_open(graph)
        return run.envelope.policies.planner.strategy == "llm"

    def start(self, run: DrivenRun, image: RegistryImage) -> None:
        """Plan in a task; the result comes to the inbox of the run."""
        run.calls[PLANNING] = asyncio.create_task(self._plan(run, image), name="planning")

    async def _plan(self, run: DrivenRun, image: RegistryImage) -> None:
        attempt = 1

        def tell(event: Event) -> None:
            nonlocal attempt
            attempt = event.data["attempt"]
            run.inbox.put(Said((event,)))

        started = time.perf_counter()
        progress = progress_of(run.state, run.outputs, run.envelope)
        asker = asker_of(run, None, None, asyncio.get_running_loop().time() + _time_for(run))
        try:
            plan = await propose_plan(
                run.envelope,
                image,
                lambda prompt: self.gateway.complete(prompt, asker),
                tell,
                run_id=run.handle.text_id,
                created_at=rfc3339(now_ms()),
                limits=self.limits,
                progress=progress,
            )
            planned = Planned(plan, progress, (time.perf_counter() - started) * 1000)
        except PlanRejected as rejected:
            planned = Planned(None, progress, 0.0, rejected, attempt)
        run.calls.pop(PLANNING, None)
        run.inbox.put(planned)


def _time_for(run: DrivenRun) -> float:
    """Seconds that planning may take."""
    deadline = deadline_at(run.state, run.limits)
    return PLANNING_S if deadline is None else min(PLANNING_S, (deadline - now_ms()) / 1000)
