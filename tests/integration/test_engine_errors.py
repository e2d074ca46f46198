"""When the engine itself is in trouble: the run ends with a reason, its neighbours go on."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from app.domain.decide import decide
from app.orchestrator import loop
from app.settings import Settings
from tests.conftest import make_settings
from tests.envelopes import chain, diamond, echo_node, graph
from tests.service import RunningService


class TestLimits:
    @pytest.fixture
    def settings(self) -> Settings:
        return make_settings(events_max=100, value_bytes_max=1_024)

    async def test_a_run_has_only_so_many_events(self, service: RunningService) -> None:
        run = await service.finished(chain(60))

        assert run["error"]["code"] == "event_limit"
        assert run["last_seq"] <= 100
        assert (await service.finished(diamond()))["status"] == "done"

    async def test_an_output_has_only_so_many_bytes(self, service: RunningService) -> None:
        big = {"id": "A", "capability": "util.echo", "inputs": {"x": {"value": "x" * 2_000}}}
        run = await service.finished(graph(big, echo_node("B")))

        [failed, other] = run["nodes"]
        assert failed["error"]["code"] == "value_too_large"
        assert "2008 bytes, 1024 are allowed" in failed["error"]["message"]
        assert other["status"] == "done"


async def test_data_that_the_journal_refuses_fails_its_run_alone(
    service: RunningService, dsn: str
) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute("alter table events add check (node_id <> 'poison')")
    await connection.close()
    poisoned = await service.submit(graph(echo_node("A"), echo_node("poison", "A")))
    healthy = await service.finished(diamond())
    events = await service.events(poisoned["run_id"])

    assert events[-1].event == "RUN_FAILED"
    assert events[-1].json["data"]["error"]["code"] == "JOURNAL_REJECTED"
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert healthy["status"] == "done"


async def test_an_error_of_the_service_itself_ends_the_run_and_hides_its_text(
    service: RunningService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(state: Any, now: int, limits: Any) -> Any:
        if state.nodes and "broken" in state.nodes and state.done_count:
            raise ZeroDivisionError("secret details")
        return decide(state, now, limits)

    monkeypatch.setattr(loop, "decide", broken)
    run = await service.finished(graph(echo_node("A"), echo_node("broken", "A")))

    assert run["error"]["code"] == "internal_error"
    assert "secret details" not in str(run)
    assert any("driving run" in record.message for record in caplog.records)
    assert (await service.finished(diamond()))["status"] == "done"


async def test_a_capability_that_no_process_knows_any_more_fails_its_node(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = service.services.runner.drive.executor
    image = executor._image

    class Emptied:
        def get(self, capability_id: str, version: str) -> None:
            return None

    monkeypatch.setattr(executor, "_image", lambda tenant: Emptied())
    run = await service.finished(diamond())
    monkeypatch.setattr(executor, "_image", image)

    assert run["nodes"][0]["error"]["code"] == "capability_not_registered"
    assert run["status"] == "failed"
