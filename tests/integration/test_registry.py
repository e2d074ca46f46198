"""The registry on a real Postgres: registration, heartbeats, facets, seeds, several processes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import cast

import pytest

from app.domain.capability import CapabilityKind, CapabilityStatus, Registration
from app.domain.errors import Conflict, ContractError, NotFound, Unavailable, Unprocessable
from app.ports import CapabilityAdapter
from app.registry.registry import DEFAULT_TENANT, Registry
from app.store.database import Database
from app.store.registry import RegistryStore
from tests.registries import AnyHttp, registration, registry_over, silence, sql, started
from tests.registry_samples import facet

T = DEFAULT_TENANT


@pytest.fixture
async def registry(database: Database) -> AsyncIterator[Registry]:
    """A started registry that knows the facets `text` and `summary`."""
    async with started(registry_over(database)) as registry:
        for name in ("text", "summary"):
            await registry.put_facet(T, facet(name))
        yield registry


def registration_in(registry: Registry) -> Registration:
    """What is planned as far.side. (Times in an image are those of its load.)"""
    capability = registry.image(T).newest("far.side")
    assert capability is not None
    return capability.registration


async def test_twenty_registrations_at_once_leave_one_row(
    database: Database, registry: Registry
) -> None:
    other = registry_over(database)
    found = await asyncio.gather(
        *[
            each.register(T, registration(summary=f"Summary {number % 3}"))
            for number in range(10)
            for each in (registry, other)
        ]
    )
    assert [answer.is_new for answer in found].count(True) == 1
    assert len({answer.capability.registered_at for answer in found}) == 1
    assert await sql(database, "select count(*) from capabilities") == [(1,)]
    await registry.refresh()
    await other.refresh()
    assert registration_in(registry) == registration_in(other)


async def test_registering_again_keeps_the_first_time(registry: Registry) -> None:
    first = await registry.register(T, registration())
    again = await registry.register(T, registration(summary="Another one."))
    assert (first.is_new, again.is_new) == (True, False)
    assert again.capability.registered_at == first.capability.registered_at
    assert again.capability.last_seen_at > first.capability.last_seen_at
    newest = registry.image(T).newest("far.side")
    assert newest is not None
    assert newest.registration.summary == "Another one."


async def test_the_newest_version_is_the_last_that_was_first_registered(registry: Registry) -> None:
    await registry.register(T, registration(version="2.0.0"))
    await registry.register(T, registration(version="1.5.0"))
    await registry.register(T, registration(version="2.0.0", summary="Registered again."))
    newest = registry.image(T).newest("far.side")
    assert newest is not None
    assert newest.version == "1.5.0"
    assert (await registry.get(T, "far.side")).version == "1.5.0"
    assert (await registry.get(T, "far.side", "2.0.0")).version == "2.0.0"


async def test_only_what_planning_sees_bumps_the_revision(
    database: Database, registry: Registry
) -> None:
    await registry.register(T, registration())
    revision = registry.image(T).revision
    image = registry.image(T)
    await registry.register(T, registration())
    await registry.heartbeat(T, "far.side")
    await registry.put_facet(T, facet("text"))
    assert await registry.sweep() == []
    await registry.refresh()
    assert registry.image(T) is image
    assert await sql(database, "select revision from registry_revisions") == [(revision,)]
    await registry.register(T, registration(timeout_s=5))
    assert registry.image(T).revision == revision + 1


async def test_a_silent_capability_is_swept_and_comes_back(
    database: Database, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    await registry.register(T, registration())
    await registry.register(T, registration("for.ever", heartbeat=None))
    await silence(database, 20)
    assert await registry.sweep() == []
    await silence(database, 11)
    with caplog.at_level(logging.WARNING):
        assert await registry.sweep() == [("far.side", "1.0.0")]
    assert "heartbeat_timeout" in caplog.text
    assert await registry.sweep() == []
    image = registry.image(T)
    assert image.newest("far.side") is None
    assert image.get("far.side", "1.0.0") is not None
    assert image.newest("for.ever") is not None
    rows = await sql(database, "select status from capabilities where capability_id = 'far.side'")
    assert rows == [("inactive",)]

    revived = await registry.heartbeat(T, "far.side")
    assert revived.status is CapabilityStatus.ACTIVE
    assert registry.image(T).newest("far.side") is not None
    assert await registry.sweep() == []
    await silence(database, 31)
    await registry.sweep()
    again = await registry.register(T, registration())
    assert again.is_new is False
    assert registry.image(T).newest("far.side") is not None


async def test_all_processes_see_expiry_and_revival(database: Database, registry: Registry) -> None:
    await registry.register(T, registration())
    async with started(registry_over(database)) as other:
        await silence(database, 31)
        await registry.sweep()
        await other.refresh()
        assert other.image(T).newest("far.side") is None
        await registry.heartbeat(T, "far.side")
        await other.refresh()
        assert other.image(T).newest("far.side") is not None


async def test_a_heartbeat_moves_the_end_of_patience(
    database: Database, registry: Registry
) -> None:
    await registry.register(T, registration(heartbeat={"interval_s": 1, "timeout_s": 100}))
    await silence(database, 60)
    await registry.heartbeat(T, "far.side", "1.0.0")
    await silence(database, 60)
    assert await registry.sweep() == []
    patience = "select extract(epoch from expires_at - last_seen_at)::int from capabilities"
    assert await sql(database, patience) == [(100,)]


@pytest.mark.parametrize(
    ("capability_id", "version"),
    [("no.such", None), ("no.such", "1"), ("far.side", "9"), ("a\0b", None), ("far.side", "1\0")],
)
async def test_what_is_not_registered_is_not_found(
    registry: Registry, capability_id: str, version: str | None
) -> None:
    await registry.register(T, registration())
    for ask in (registry.get, registry.heartbeat):
        with pytest.raises(NotFound) as caught:
            await ask(T, capability_id, version)
        assert caught.value.code == "capability_not_found"


async def test_all_faults_of_both_sides_are_told_with_their_place(registry: Registry) -> None:
    await registry.put_facet(T, facet("only_in", direction="input"))
    given = registration(
        input_contract={"facets": ["text", "nobody_knows"]},
        output_contract={"facets": ["only_in"]},
    )
    with pytest.raises(ContractError) as caught:
        await registry.register(T, given)
    assert [(fault.code, fault.pointer) for fault in caught.value.faults] == [
        ("FACET_NOT_FOUND", "/input_contract/facets/1"),
        ("DIRECTION_MISMATCH", "/output_contract/facets/0"),
    ]
    assert not registry.image(T).is_known("far.side")


async def test_what_the_adapter_refuses_is_not_registered(registry: Registry) -> None:
    with pytest.raises(Unprocessable) as caught:
        await registry.register(T, registration(config={"refuse": 1}))
    assert caught.value.code == "registration_invalid"
    assert [fault.pointer for fault in caught.value.faults] == ["/config/refuse"]


async def test_one_facet_version_has_one_body(registry: Registry) -> None:
    assert (await registry.put_facet(T, facet("text"))).is_new is False
    with pytest.raises(Conflict) as caught:
        await registry.put_facet(T, facet("text", {"type": "integer"}))
    assert caught.value.code == "facet_version_conflict"
    stored = await registry.put_facet(T, facet("text", {"type": "integer"}, version="2.0.0"))
    assert stored.is_new is False
    assert (await registry.facet(T, "text")).version == "2.0.0"


async def test_a_new_facet_version_is_compiled_into_what_uses_it(registry: Registry) -> None:
    await registry.register(T, registration())
    await registry.put_facet(T, facet("text", {"type": "string", "maxLength": 3}, version="2"))
    capability = registry.image(T).newest("far.side")
    assert capability is not None
    assert capability.input.schema["properties"]["text"]["maxLength"] == 3
    assert not capability.input.is_valid({"text": "four"})


async def test_a_facet_change_that_breaks_a_capability_is_refused(registry: Registry) -> None:
    await registry.register(T, registration())
    before = registry.image(T)
    with pytest.raises(Conflict) as caught:
        await registry.put_facet(T, facet("summary", version="2", direction="input"))
    assert caught.value.code == "facet_in_use"
    (fault,) = caught.value.faults
    assert (fault.code, fault.capability_id) == ("DIRECTION_MISMATCH", "far.side")
    assert registry.image(T) is before
    assert (await registry.facet(T, "summary")).version == "1.0.0"


async def test_a_facet_needs_a_sound_schema_and_known_dependencies(registry: Registry) -> None:
    with pytest.raises(ContractError) as unsound:
        await registry.put_facet(T, facet("broken", {"type": "no such type"}))
    assert unsound.value.faults[0].pointer.startswith("/schema")
    with pytest.raises(Unprocessable) as unknown:
        await registry.put_facet(T, facet("lonely", depends_on=["text", "nobody_knows"]))
    assert [fault.pointer for fault in unknown.value.faults] == ["/metadata/depends_on/1"]


async def test_another_process_is_seen_at_the_next_sweep(
    database: Database, registry: Registry
) -> None:
    async with started(registry_over(database)) as other:
        await registry.register(T, registration())
        assert other.image(T).newest("far.side") is None
        await other.sweep()
        assert other.image(T) is not registry.image(T)
        assert other.image(T).revision == registry.image(T).revision
        assert registration_in(other) == registration_in(registry)


async def test_a_registration_is_judged_against_facets_of_another_process(
    database: Database, registry: Registry
) -> None:
    async with started(registry_over(database)) as other:
        await other.put_facet(T, facet("fresh"))
        await registry.register(T, registration(input_contract={"facets": ["fresh"]}))
        await registry.put_facet(T, facet("summary", version="2", direction="output"))
        with pytest.raises(ContractError):
            await other.register(T, registration("x", input_contract={"facets": ["summary"]}))
        await registry.put_facet(T, facet("late"))
        assert (await other.facet(T, "late")).name == "late"


async def test_what_another_process_registered_is_shown_at_once(
    database: Database, registry: Registry
) -> None:
    async with started(registry_over(database)) as other:
        await registry.register(T, registration())
        assert (await other.get(T, "far.side")).input.facets == ("text",)
        await registry.register(T, registration("later"))
        page, last = await other.page(T)
        assert [capability.capability_id for capability in page] == ["far.side", "later"]
        assert last is None


async def test_a_bad_row_is_skipped_and_named(
    database: Database, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    await registry.register(T, registration())
    await registry.register(T, registration("broken"))
    await registry.register(T, registration("strange", output_contract={"facets": ["text"]}))
    await sql(database, "update capabilities set body = '{' where capability_id = 'broken'")
    await sql(database, "update facets set body = '[]' where name = 'summary'")
    await sql(database, "update registry_revisions set revision = revision + 1")
    await registry.sweep()
    image = registry.image(T)
    assert image.newest("strange") is not None
    assert not image.is_known("broken")
    assert not image.is_known("far.side")
    assert "broken 1.0.0 is left out: STORED_ROW_INVALID" in caplog.text
    assert "far.side 1.0.0 is left out: FACET_NOT_FOUND" in caplog.text
    with pytest.raises(NotFound):
        await registry.get(T, "broken")
    page, _ = await registry.page(T)
    assert [capability.capability_id for capability in page] == ["strange"]
    await registry.put_facet(T, facet("summary"))
    assert (await registry.register(T, registration("broken"))).is_new is False
    assert registry.image(T).newest("far.side") is not None


async def test_pages_go_through_everything_once(registry: Registry) -> None:
    for number in range(5):
        await registry.register(T, registration(f"c{number}", version=f"{number % 2}"))
    await registry.register(T, registration("c0", version="1"))
    seen, after = [], None
    while True:
        page, after = await registry.page(T, after=after, limit=2)
        seen += [capability.key for capability in page]
        if after is None:
            break
    assert seen == [("c0", "0"), ("c0", "1"), ("c1", "1"), ("c2", "0"), ("c3", "1"), ("c4", "0")]
    assert await registry.page(T, status=CapabilityStatus.INACTIVE) == ([], None)


async def test_tenants_do_not_see_each_other(registry: Registry) -> None:
    await registry.put_facet("other", facet("text"))
    await registry.put_facet("other", facet("summary"))
    await registry.register("other", registration())
    assert not registry.image(T).is_known("far.side")
    with pytest.raises(NotFound):
        await registry.get(T, "far.side")
    assert registry.image("nobody").revision == 0


async def test_the_sweeper_lives_through_an_outage(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(
        RegistryStore(database),
        {CapabilityKind.HTTP: cast(CapabilityAdapter, AnyHttp())},
        sweep_s=0.001,
    )
    sweep, answers = registry.sweep, asyncio.Queue[BaseException | None]()
    swept = asyncio.Event()

    async def troubled() -> list[tuple[str, str]]:
        trouble = answers.get_nowait() if not answers.empty() else None
        if trouble is not None:
            raise trouble
        swept.set()
        return await sweep()

    monkeypatch.setattr(registry, "sweep", troubled)
    for trouble in (Unavailable("away"), Unavailable("away"), ValueError("a bug")):
        answers.put_nowait(trouble)
    with caplog.at_level(logging.INFO):
        async with started(registry):
            await asyncio.wait_for(swept.wait(), 5)
    assert caplog.text.count("out of reach") == 1
    assert "the sweep of the registry failed" in caplog.text
    assert "fresh again" in caplog.text


async def test_without_postgres_the_image_stays(database: Database, registry: Registry) -> None:
    await registry.register(T, registration())
    image = registry.image(T)
    await sql(database, "alter table registry_revisions rename to hidden")
    try:
        with pytest.raises(Exception, match="registry_revisions"):
            await registry.sweep()
        assert registry.image(T) is image
        assert registry.image(T).newest("far.side") is not None
    finally:
        await sql(database, "alter table hidden rename to registry_revisions")
