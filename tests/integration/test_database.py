"""What the statements that are not hot cost, in round trips."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event, text

from app.store.database import Database
from tests.envelopes import diamond
from tests.service import RunningService


async def test_a_read_begins_no_transaction(database: Database) -> None:
    asked: list[str] = []
    async with database.engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        # asyncpg tells what is not prepared: the ping, and where transactions begin and end.
        driver.add_query_logger(lambda query: asked.append(query.query))
    async with database.read() as connection:
        await connection.execute(text("select 1"))
    assert asked == [";"]
    asked.clear()
    async with database.transaction() as connection:
        await connection.execute(text("select 1"))
    assert asked == [";", "BEGIN ISOLATION LEVEL READ COMMITTED;", "COMMIT;"]


async def test_a_run_is_read_with_three_statements(service: RunningService) -> None:
    run = await service.finished(diamond())
    asked: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        if "FROM runs" in statement or "FROM events" in statement:  # housekeeping goes on
            asked.append(statement)

    engine = service.services.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        found = await service.client.get(f"/v1/runs/{run['run_id']}")
    finally:
        event.remove(engine, "before_cursor_execute", note)
    assert found.json() == run
    # The run with its plans and newest snapshot, the events behind that, the last event.
    assert len(asked) == 3, asked
