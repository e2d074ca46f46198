"""Capabilities, facets and the registry's revision in Postgres.

For `app.registry` only, which knows what the bodies mean. The revision counts every change that
planning can see. Whoever changes something locks the revision row first, then touches capabilities:
so changes of one tenant come one after the other, and a contract is judged against facets that
stay. A heartbeat changes nothing that planning sees and needs no lock.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, exists, func, literal, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.database import Database
from app.store.tables import capabilities, facets, registry_revisions

CapabilityKey = tuple[str, str]
"""`(capability_id, version)`."""

FIRST_REVISION = 1


@dataclass(frozen=True, slots=True)
class CapabilityRow:
    """A stored registration; `body` is its JSON, `status` is active or inactive."""

    capability_id: str
    version: str
    body: str
    status: str
    registered_at: datetime
    last_seen_at: datetime

    @property
    def key(self) -> CapabilityKey:
        return (self.capability_id, self.version)


@dataclass(frozen=True, slots=True)
class RegistryRows:
    """Everything of one tenant at one revision. `facets` maps names to their JSON."""

    revision: int
    facets: dict[str, str]
    capabilities: list[CapabilityRow]


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a look at a tenant costs next to nothing to find out."""

    tenant_id: str
    revision: int
    has_expired: bool


_ROW = (
    capabilities.c.capability_id,
    capabilities.c.version,
    capabilities.c.body,
    capabilities.c.status,
    capabilities.c.registered_at,
    capabilities.c.last_seen_at,
)
_is_expired = and_(capabilities.c.status == "active", capabilities.c.expires_at < func.now())
_newest_first = (capabilities.c.registered_at.desc(), capabilities.c.version.desc())


class RegistryStore:
    """All statements on the registry's tables. Raises `Unavailable` when Postgres is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def pulses(self) -> list[Pulse]:
        """The revision of every tenant, and whether a heartbeat ran out by the database clock."""
        expired = exists().where(
            capabilities.c.tenant_id == registry_revisions.c.tenant_id, _is_expired
        )
        statement = select(
            registry_revisions.c.tenant_id, registry_revisions.c.revision, expired
        ).order_by(registry_revisions.c.tenant_id)
        async with self._database.read() as connection:
            return [Pulse(*row) for row in await connection.execute(statement)]

    async def load(self, tenant_id: str) -> RegistryRows | None:
        """Facets and capabilities of one moment; None when nothing was ever registered."""
        async with self._database.read() as connection:
            # One snapshot for all statements: a facet never comes without the capability beside it.
            snapshot = await connection.execution_options(isolation_level="REPEATABLE READ")
            statement = select(registry_revisions.c.revision).where(
                registry_revisions.c.tenant_id == tenant_id
            )
            revision = (await snapshot.execute(statement)).scalar()
            return None if revision is None else await _rows(snapshot, tenant_id, revision)

    async def get(
        self, tenant_id: str, capability_id: str, version: str | None
    ) -> CapabilityRow | None:
        """One registration; without a version the newest active one, else the newest."""
        statement = (
            select(*_ROW)
            .where(_is_of(tenant_id, capability_id, version))
            .order_by(capabilities.c.status, *_newest_first)
            .limit(1)
        )
        async with self._database.read() as connection:
            return _row_of((await connection.execute(statement)).first())

    async def page(
        self, tenant_id: str, *, after: CapabilityKey | None, limit: int, status: str | None
    ) -> list[CapabilityRow]:
        """Registrations behind a key, ordered by id and version."""
        place = tuple_(capabilities.c.capability_id, capabilities.c.version)
        statement = (
            select(*_ROW)
            .where(capabilities.c.tenant_id == tenant_id)
            .order_by(capabilities.c.capability_id, capabilities.c.version)
            .limit(limit)
        )
        if after is not None:
            statement = statement.where(place > tuple_(literal(after[0]), literal(after[1])))
        if status is not None:
            statement = statement.where(capabilities.c.status == status)
        async with self._database.read() as connection:
            return [CapabilityRow(*row) for row in await connection.execute(statement)]

    async def beat(
        self, tenant_id: str, capability_id: str, version: str, *, body: str | None = None
    ) -> CapabilityRow | None:
        """Note a sign of life of an active registration; None when there is no such one.

        With `body` only if exactly that is what is registered.
        """
        wanted = and_(_is_of(tenant_id, capability_id, version), capabilities.c.status == "active")
        if body is not None:
            wanted = and_(wanted, capabilities.c.body == body)
        async with self._database.transaction() as connection:
            return _row_of((await connection.execute(_beaten(wanted))).first())

    @asynccontextmanager
    async def change(self, tenant_id: str) -> AsyncIterator[RegistryChange]:
        """A transaction that no other change of this tenant overlaps; an error undoes it."""
        async with self._database.transaction() as connection:
            # The update to itself locks the row; a plain "do nothing" would not return it.
            statement = (
                insert(registry_revisions)
                .values(tenant_id=tenant_id, revision=FIRST_REVISION)
                .on_conflict_do_update(
                    index_elements=["tenant_id"],
                    set_={"revision": registry_revisions.c.revision},
                )
                .returning(registry_revisions.c.revision)
            )
            revision: int = (await connection.execute(statement)).scalar_one()
            yield RegistryChange(connection, tenant_id, revision)


class RegistryChange:
    """The statements of one change. `revision` is the one that was locked, then the bumped one."""

    def __init__(self, connection: AsyncConnection, tenant_id: str, revision: int) -> None:
        self._connection = connection
        self._tenant_id = tenant_id
        self.revision = revision

    async def rows(self) -> RegistryRows:
        """Everything of the tenant, with what this change has written so far."""
        return await _rows(self._connection, self._tenant_id, self.revision)

    async def bump(self) -> int:
        """The next revision: planning can see what this change did."""
        statement = (
            update(registry_revisions)
            .where(registry_revisions.c.tenant_id == self._tenant_id)
            .values(revision=registry_revisions.c.revision + 1)
            .returning(registry_revisions.c.revision)
        )
        self.revision = (await self._connection.execute(statement)).scalar_one()
        return self.revision

    async def put_capability(
        self, capability_id: str, version: str, body: str, silence_max: timedelta | None
    ) -> CapabilityRow:
        """Register, or register again: then `registered_at` stays what it was."""
        # Not now(): capabilities that are registered in one transaction keep their order.
        at = func.statement_timestamp()
        values = {
            "body": body,
            "status": "active",
            "last_seen_at": at,
            "expires_at": None if silence_max is None else at + literal(silence_max),
        }
        statement = (
            insert(capabilities)
            .values(
                tenant_id=self._tenant_id,
                capability_id=capability_id,
                version=version,
                registered_at=at,
                **values,
            )
            .on_conflict_do_update(
                index_elements=["tenant_id", "capability_id", "version"], set_=values
            )
            .returning(*_ROW)
        )
        return CapabilityRow(*(await self._connection.execute(statement)).one())

    async def put_facet(self, name: str, body: str) -> None:
        """Store the facet in place of any other version of it."""
        values = {"body": body, "registered_at": func.now()}
        statement = (
            insert(facets)
            .values(tenant_id=self._tenant_id, name=name, **values)
            .on_conflict_do_update(index_elements=["tenant_id", "name"], set_=values)
        )
        await self._connection.execute(statement)

    async def revive(self, capability_id: str, version: str) -> CapabilityRow | None:
        """A sign of life whatever the status: it is active again. None when it is unknown."""
        wanted = _is_of(self._tenant_id, capability_id, version)
        return _row_of((await self._connection.execute(_beaten(wanted))).first())

    async def expire(self) -> list[CapabilityKey]:
        """Set to inactive what was silent for too long by the database clock."""
        statement = (
            update(capabilities)
            .where(capabilities.c.tenant_id == self._tenant_id, _is_expired)
            .values(status="inactive")
            .returning(capabilities.c.capability_id, capabilities.c.version)
        )
        rows = await self._connection.execute(statement)
        return sorted((row.capability_id, row.version) for row in rows)


async def _rows(connection: AsyncConnection, tenant_id: str, revision: int) -> RegistryRows:
    facet_rows = await connection.execute(
        select(facets.c.name, facets.c.body)
        .where(facets.c.tenant_id == tenant_id)
        .order_by(facets.c.name)
    )
    capability_rows = await connection.execute(
        select(*_ROW)
        .where(capabilities.c.tenant_id == tenant_id)
        .order_by(capabilities.c.capability_id, capabilities.c.version)
    )
    return RegistryRows(
        revision,
        {row.name: row.body for row in facet_rows},
        [CapabilityRow(*row) for row in capability_rows],
    )


def _row_of(row: Row[*tuple[Any, ...]] | None) -> CapabilityRow | None:
    return None if row is None else CapabilityRow(*row)


def _is_of(tenant_id: str, capability_id: str, version: str | None) -> ColumnElement[bool]:
    named = and_(
        capabilities.c.tenant_id == tenant_id, capabilities.c.capability_id == capability_id
    )
    return named if version is None else and_(named, capabilities.c.version == version)


def _beaten(wanted: ColumnElement[bool]) -> Any:
    # The patience of a registration is the distance of its two times, so its body need not be read.
    patience = capabilities.c.expires_at - capabilities.c.last_seen_at
    return (
        update(capabilities)
        .where(wanted)
        .values(status="active", last_seen_at=func.now(), expires_at=func.now() + patience)
        .returning(*_ROW)
    )
