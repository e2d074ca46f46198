"""What a starting program puts into the registry, and what it leaves alone."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from app.domain.capability import CapabilityKind, CapabilityStatus
from app.domain.errors import Conflict
from app.ports import CapabilityAdapter
from app.registry.registry import DEFAULT_TENANT, Registry
from app.store.database import SESSION_SETTINGS, Database
from app.store.registry import RegistryStore
from tests.registries import AnyHttp, pack, registration, registry_over, started
from tests.registry_samples import facet

T = DEFAULT_TENANT


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is last in a queue for a lock waits as long as all others take, on any machine."""
    for limit in ("lock_timeout", "statement_timeout"):
        monkeypatch.setitem(SESSION_SETTINGS, limit, "20s")


async def test_seeding_twice_changes_nothing(database: Database) -> None:
    async with started(registry_over(database)) as registry:
        await registry.seed(pack().facets(), pack().registrations())
        image = registry.image(T)
        assert image.newest("text.upper") is not None
        await registry.seed(pack().facets(), pack().registrations())
        assert registry.image(T) is image
    async with started(registry_over(database)) as registry:
        await registry.seed(pack().facets(), pack().registrations())
        assert registry.image(T).revision == image.revision


@pytest.mark.usefixtures("patient")
async def test_twenty_processes_seed_at_once(database: Database) -> None:
    registries = [registry_over(database) for _ in range(20)]
    await asyncio.gather(
        *[each.seed(pack().facets(), pack().registrations()) for each in registries]
    )
    assert {each.image(T).revision for each in registries} == {2}


async def test_the_newest_builtin_version_wins_and_an_old_one_is_not_planned(
    database: Database,
) -> None:
    old, new = pack("1.9.0"), pack("1.10.0")
    async with started(registry_over(database, old)) as registry:
        await registry.seed(old.facets(), old.registrations())
    async with started(registry_over(database, new)) as registry:
        await registry.seed(new.facets(), new.registrations())
        newest = registry.image(T).newest("text.upper")
        assert newest is not None
        assert newest.version == "1.10.0"
        assert (await registry.facet(T, "loud")).version == "1.10.0"
        gone = registry.image(T).get("text.upper", "1.9.0")
        assert gone is not None
        assert gone.status is CapabilityStatus.INACTIVE


async def test_versions_seeded_together_keep_their_order(database: Database) -> None:
    both = [pack("1.10.0"), pack("1.9.0")]
    registrations = [found for each in both for found in each.registrations()]
    adapters = {CapabilityKind.BUILTIN: cast(CapabilityAdapter, AnyHttp())}
    async with started(Registry(RegistryStore(database), adapters)) as registry:
        await registry.seed(both[0].facets(), registrations)
        newest = registry.image(T).newest("text.upper")
        assert newest is not None
        assert newest.version == "1.10.0"


async def test_seeding_respects_the_operator(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(registry_over(database)) as registry:
        await registry.put_facet(T, facet("loud", {"type": "integer"}, owner="operator"))
        mine = registration("text.upper", input_contract={"schema": {}})
        await registry.put_facet(T, facet("summary"))
        await registry.register(T, mine)
        newer = pack("2.0.0")
        await registry.seed(newer.facets(), pack().registrations())
        assert (await registry.facet(T, "loud")).metadata.owner == "operator"
        assert "operator's own" in caplog.text
        kept = registry.image(T).get("text.upper", "1.0.0")
        assert kept is not None
        assert kept.registration == mine


async def test_a_builtin_that_does_not_fit_is_left_out(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(registry_over(database)) as registry:
        await registry.put_facet(T, facet("loud", direction="input", owner="operator"))
        await registry.seed(pack().facets(), pack().registrations())
        assert not registry.image(T).is_known("text.upper")
        assert "builtin text.upper 1.0.0 is left out: DIRECTION_MISMATCH" in caplog.text


async def test_a_builtin_is_not_replaced_from_outside(database: Database) -> None:
    async with started(registry_over(database)) as registry:
        await registry.seed(pack().facets(), pack().registrations())
        both = {"facets": ["loud"]}
        taken = registration("text.upper", input_contract=both, output_contract=both)
        with pytest.raises(Conflict) as caught:
            await registry.register(T, taken)
        assert caught.value.code == "capability_is_builtin"
