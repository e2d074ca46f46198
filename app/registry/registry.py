"""The registry: what is known of capabilities and facets, kept in memory and in Postgres.

Planner and executor read `image()` only. All changes go through here: each is one transaction that
holds the tenant's revision, is judged against the facets of that revision, and swaps the image in
when it is durable. Other processes see it at their next look (`sweep_s`).

What was decided where rules meet:
- Registering the same id and version again replaces the registration and keeps `registered_at`.
- A facet has one version at a time. Another version replaces it and what uses it is compiled anew;
  it is refused when a registered capability, active or not, would not compile any more.
- What this process can not run (its adapter refuses it) is inactive in this process's image only:
  during a rolling upgrade another process may well run it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TypeVar

from app.domain.capability import (
    CAPABILITY_ID,
    Capability,
    CapabilityKind,
    CapabilityStatus,
    Registration,
)
from app.domain.contract import Contract, ContractSpec
from app.domain.errors import Fault, NotFound, Unavailable
from app.domain.facet import Facet
from app.domain.json_schema import compile_schema
from app.kit.waiting import wait_at_most
from app.ports import CapabilityAdapter
from app.registry import changes
from app.registry.changes import FacetStored, Registered
from app.registry.image import RegistryImage
from app.registry.loaded import NOTHING, Check, Loaded, compile_sides, read_rows, seen
from app.registry.seed import facets_to_seed, registrations_to_seed
from app.store.registry import CapabilityKey, CapabilityRow, RegistryChange, RegistryStore

log = logging.getLogger("flexrun.registry")

DEFAULT_TENANT = "default"
SWEEP_S = 5.0
CLOSE_S = 5.0
VERSION_CHARS_MAX = 64

T = TypeVar("T")
Work = Callable[[RegistryChange, Loaded, Check], Awaitable[tuple[Loaded, T]]]
"""What is done in a change: gets the state before it, answers the state after it and a result."""


class Registry:
    """Capabilities and facets of all tenants. `start` it before use, `close` it at the end.

    `adapters` are by capability kind, `sweep_s` is the time between two looks at Postgres.
    """

    def __init__(
        self,
        store: RegistryStore,
        adapters: Mapping[CapabilityKind, CapabilityAdapter],
        *,
        sweep_s: float = SWEEP_S,
    ) -> None:
        self._store = store
        self._adapters = adapters
        self._sweep_s = sweep_s
        self._loaded: dict[str, Loaded] = {}
        self._changing = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._sweeper: asyncio.Task[None] | None = None

    def image(self, tenant_id: str) -> RegistryImage:
        """What planner and executor work with. No I/O; hold on to it for one plan or call.

        `last_seen_at` in it may be old: a heartbeat changes nothing that planning sees.
        """
        return self._of(tenant_id).image

    def facets(self, tenant_id: str) -> Mapping[str, Facet]:
        """The catalog by name. No I/O."""
        return self._of(tenant_id).facets

    def facets_of(self, capability_id: str) -> dict[str, list[str]]:
        """The facets that the newest version of a capability reads and makes. No I/O."""
        found = self._of(DEFAULT_TENANT).image.newest(capability_id)
        if found is None:
            return {"input": [], "output": []}
        return {"input": list(found.input.facets), "output": list(found.output.facets)}

    async def start(self) -> None:
        """Load, then look after refresh and expiry until `close`. Raises `Unavailable`."""
        await self.refresh()
        self._sweeper = asyncio.create_task(self._keep_sweeping(), name="registry-sweeper")

    async def close(self) -> None:
        """Stop the sweeper; one that hangs is cancelled after 5 s."""
        self._stopping.set()
        if self._sweeper is not None:
            done, _ = await asyncio.wait({self._sweeper}, timeout=CLOSE_S)
            if not done:
                self._sweeper.cancel()
                await asyncio.gather(self._sweeper, return_exceptions=True)

    async def refresh(self) -> None:
        """Load what other processes have changed; one small query when nothing did."""
        for pulse in await self._store.pulses():
            if pulse.revision != self._of(pulse.tenant_id).revision:
                await self._reload(pulse.tenant_id)

    async def sweep(self) -> list[CapabilityKey]:
        """Expire what was silent for too long, then refresh; answers what became inactive."""
        expired: list[CapabilityKey] = []
        for pulse in await self._store.pulses():
            if pulse.has_expired:
                expired += await self._change(pulse.tenant_id, changes.expire)
            elif pulse.revision != self._of(pulse.tenant_id).revision:
                await self._reload(pulse.tenant_id)
        return expired

    async def register(self, tenant_id: str, registration: Registration) -> Registered:
        """Register a capability, or note a sign of life when it is registered just so.

        Raises `ContractError` (facets or schemas do not compile), `Unprocessable`
        `registration_invalid` (its adapter refuses it), `Conflict` `capability_is_builtin`.
        """
        loaded = self._of(tenant_id)
        key = (registration.capability_id, registration.version)
        known = loaded.capabilities.get(key)
        body = registration.model_dump_json()
        if known is not None and changes.is_active(known) and loaded.bodies.get(key) == body:
            row = await self._store.beat(tenant_id, *key, body=body)
            if row is not None:
                return Registered(seen(known, row), is_new=False)
        return await self._change(
            tenant_id,
            lambda change, loaded, check: changes.register(change, loaded, check, registration),
        )

    async def heartbeat(
        self, tenant_id: str, capability_id: str, version: str | None = None
    ) -> Capability:
        """Note a sign of life; without a version of the newest. Revives an inactive one.

        Raises `NotFound`.
        """
        key = (await self._row(tenant_id, capability_id, version)).key
        row = await self._store.beat(tenant_id, *key) or await self._change(
            tenant_id, lambda change, loaded, check: changes.revive(change, loaded, check, key)
        )
        capability = None if row is None else await self._capability_of(tenant_id, row)
        if capability is None:
            raise _no_capability(capability_id, version)
        return capability

    async def get(
        self, tenant_id: str, capability_id: str, version: str | None = None
    ) -> Capability:
        """One capability with its times as stored; without a version the newest active one.

        Raises `NotFound`, also for a stored registration that does not compile any more.
        """
        row = await self._row(tenant_id, capability_id, version)
        capability = await self._capability_of(tenant_id, row)
        if capability is None:
            raise _no_capability(capability_id, version)
        return capability

    async def page(
        self,
        tenant_id: str,
        *,
        after: CapabilityKey | None = None,
        limit: int = 50,
        status: CapabilityStatus | None = None,
    ) -> tuple[list[Capability], CapabilityKey | None]:
        """Capabilities by id and version, and the key to go on behind (None at the end)."""
        rows = await self._store.page(tenant_id, after=after, limit=limit + 1, status=status)
        shown = rows[:limit]
        found = [await self._capability_of(tenant_id, row) for row in shown]
        capabilities = [capability for capability in found if capability is not None]
        return capabilities, shown[-1].key if len(rows) > limit else None

    async def put_facet(self, tenant_id: str, facet: Facet) -> FacetStored:
        """Add a facet, or replace it by another version of it.

        Raises `ContractError` (its schema is unsound), `Unprocessable` `facet_invalid` (depends on
        unknown facets), `Conflict` `facet_version_conflict` (this version has another body) and
        `facet_in_use` (capabilities would not compile any more; its faults name them).
        """
        compile_schema(facet.json_schema, "/schema")
        return await self._change(
            tenant_id,
            lambda change, loaded, check: changes.put_facet(change, loaded, check, facet),
        )

    async def facet(self, tenant_id: str, name: str) -> Facet:
        """One facet; asks Postgres once when it is not known here. Raises `NotFound`."""
        found = self._of(tenant_id).facets.get(name)
        if found is None:
            await self.refresh()
            found = self._of(tenant_id).facets.get(name)
        if found is None:
            raise NotFound(f"There is no facet {name[:120]!r}.", code="facet_not_found")
        return found

    def compile(
        self,
        tenant_id: str,
        input_contract: ContractSpec | None,
        output_contract: ContractSpec | None,
    ) -> tuple[Contract | None, Contract | None]:
        """Compile both sides against the catalog; registers nothing.

        Raises `ContractError` with pointers under /input_contract and /output_contract.
        """
        return compile_sides(input_contract, output_contract, self._of(tenant_id).facets)

    async def seed(
        self,
        facets: Iterable[Facet],
        registrations: Iterable[Registration],
        tenant_id: str = DEFAULT_TENANT,
    ) -> None:
        """Put the program's own facets and builtins in; writes nothing when all is there.

        What it may replace is told in `app.registry.seed`. A builtin that does not fit the catalog
        is logged and left out.
        """
        facets, registrations = list(facets), list(registrations)
        await self.refresh()
        loaded = self._of(tenant_id)
        if facets_to_seed(loaded, facets) or registrations_to_seed(loaded, registrations):
            await self._change(
                tenant_id,
                lambda change, loaded, check: changes.seed(
                    change, loaded, check, facets, registrations
                ),
            )

    async def _change(self, tenant_id: str, work: Work[T]) -> T:
        """Do the work in one transaction, under the lock, and show it when it is durable."""
        async with self._changing:
            async with self._store.change(tenant_id) as change:
                loaded = self._of(tenant_id)
                if change.revision != loaded.revision:
                    loaded = read_rows(await change.rows(), loaded, self._check)
                after, answer = await work(change, loaded, self._check)
            self._show(tenant_id, after)
        return answer

    async def _reload(self, tenant_id: str) -> None:
        async with self._changing:
            rows = await self._store.load(tenant_id)
            loaded = self._of(tenant_id)
            if rows is not None and rows.revision != loaded.revision:
                self._show(tenant_id, read_rows(rows, loaded, self._check))

    def _of(self, tenant_id: str) -> Loaded:
        return self._loaded.get(tenant_id, NOTHING)

    def _show(self, tenant_id: str, loaded: Loaded) -> None:
        before = self._of(tenant_id)
        self._loaded[tenant_id] = loaded
        for key in loaded.skipped.keys() - before.skipped.keys():
            log.error("%s %s is left out: %s", *key, changes.shown(loaded.skipped[key]))
        for capability_id, version in loaded.refused - before.refused:
            log.warning("%s %s can not be run by this process", capability_id, version)

    async def _row(self, tenant_id: str, capability_id: str, version: str | None) -> CapabilityRow:
        # What can not be an id never gets to Postgres, which has no text with NUL in it.
        is_possible = CAPABILITY_ID.fullmatch(capability_id) and (
            version is None or (version.isprintable() and len(version) <= VERSION_CHARS_MAX)
        )
        row = await self._store.get(tenant_id, capability_id, version) if is_possible else None
        if row is None:
            raise _no_capability(capability_id, version)
        return row

    async def _capability_of(self, tenant_id: str, row: CapabilityRow) -> Capability | None:
        """A row with its contracts; None when it does not compile."""
        if not self._of(tenant_id).has(row):
            await self.refresh()  # another process registered it, and our sweeper is not there yet
        return self._of(tenant_id).capability_of(row)

    def _check(self, capability: Capability) -> list[Fault]:
        kind = capability.registration.kind
        adapter = self._adapters.get(kind)
        if adapter is None:
            return [Fault("kind_unsupported", f"nothing here runs kind {kind.value}", "/kind")]
        return adapter.check(capability)

    async def _keep_sweeping(self) -> None:
        is_away = False
        while not self._stopping.is_set():
            if not await wait_at_most(self._stopping, self._sweep_s):
                is_away = await self._sweep_once(was_away=is_away)

    async def _sweep_once(self, *, was_away: bool) -> bool:
        """Whether Postgres is away. Whatever happens, the next sweep comes."""
        try:
            await self.sweep()
        except Unavailable:
            if not was_away:
                log.warning("the registry stays as it is: Postgres is out of reach")
            return True
        except Exception:
            log.exception("the sweep of the registry failed")
            return was_away
        if was_away:
            log.info("the registry is fresh again")
        return False


def _no_capability(capability_id: str, version: str | None) -> NotFound:
    named = capability_id if version is None else f"{capability_id} {version}"
    return NotFound(f"There is no capability {named[:200]!r}.", code="capability_not_found")
