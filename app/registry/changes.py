"""What each change of the registry does, inside its transaction.

For `registry.py`. A change gets what is true under the tenant's lock and answers what is true after
it; raising undoes it. None of these touches the memory of the process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from app.domain.capability import Capability, CapabilityKind, CapabilityStatus, Registration
from app.domain.errors import Conflict, ContractError, Fault, Unprocessable
from app.domain.facet import Facet
from app.domain.tools import tool_faults
from app.registry.loaded import Check, Loaded, compile_registration, read_rows, seen
from app.registry.seed import facets_to_seed, registrations_to_seed
from app.store.registry import CapabilityKey, CapabilityRow, RegistryChange

log = logging.getLogger("flexrun.registry")

FAULTS_SHOWN_MAX = 20


class Registered(NamedTuple):
    """`is_new`: this id and version was not registered before."""

    capability: Capability
    is_new: bool


class FacetStored(NamedTuple):
    """`is_new`: no facet of this name was there before."""

    facet: Facet
    is_new: bool


async def register(
    change: RegistryChange, loaded: Loaded, check: Check, registration: Registration
) -> tuple[Loaded, Registered]:
    """See `Registry.register`."""
    key = (registration.capability_id, registration.version)
    known = loaded.capabilities.get(key)
    if known is not None and _is_builtin(known.registration) and not _is_builtin(registration):
        raise Conflict(
            f"{key[0]} {key[1]} comes with the program; register another version or id.",
            code="capability_is_builtin",
        )
    capability = compile_registration(registration, loaded.facets, datetime.now(UTC))

    def find(capability_id: str, version: str | None) -> Capability | None:
        return loaded.image.find(capability_id, version)  # built only for what has tools

    if faults := check(capability) or tool_faults(capability, find):
        raise Unprocessable(
            "The registration can not be run.", code="registration_invalid", faults=faults
        )
    body = registration.model_dump_json()
    row = await change.put_capability(*key, body, _silence_max(registration))
    is_same = known is not None and is_active(known) and loaded.bodies.get(key) == body
    revision = loaded.revision if is_same else await change.bump()
    capability = seen(capability, row)
    answer = Registered(capability, is_new=key not in loaded.bodies)
    return loaded.with_capability(revision, capability, body), answer


async def revive(
    change: RegistryChange, loaded: Loaded, check: Check, key: CapabilityKey
) -> tuple[Loaded, CapabilityRow | None]:
    """A sign of life of a capability that was given up; None when it is not there any more."""
    row = await change.revive(*key)
    if row is None:
        return loaded, None
    await change.bump()
    return read_rows(await change.rows(), loaded, check), row


async def put_facet(
    change: RegistryChange, loaded: Loaded, check: Check, facet: Facet
) -> tuple[Loaded, FacetStored]:
    """See `Registry.put_facet`."""
    known = loaded.facets.get(facet.name)
    if known == facet:
        return loaded, FacetStored(facet, is_new=False)
    if known is not None and known.version == facet.version:
        raise Conflict(
            f"Facet {facet.name} {facet.version} has another body; give it a new version.",
            code="facet_version_conflict",
        )
    if faults := _unknown_dependencies(facet, loaded.facets):
        raise Unprocessable(
            "The facet depends on unknown facets.", code="facet_invalid", faults=faults
        )
    await change.put_facet(facet.name, facet.model_dump_json())
    await change.bump()
    after = read_rows(await change.rows(), loaded, check)
    if broken := after.skipped.keys() - loaded.skipped.keys():
        raise Conflict(
            f"The facet is in use: {len(broken)} capabilities would not compile any more.",
            code="facet_in_use",
            faults=_broken_by(after, sorted(broken)),
        )
    return after, FacetStored(facet, is_new=known is None)


async def expire(
    change: RegistryChange, loaded: Loaded, check: Check
) -> tuple[Loaded, list[CapabilityKey]]:
    """Give up what was silent for too long; answers what became inactive."""
    expired = await change.expire()
    if not expired:  # its owner was heard of, or another process was faster
        return loaded, expired
    await change.bump()
    for capability_id, version in expired:
        log.warning("%s %s is inactive: heartbeat_timeout", capability_id, version)
    return read_rows(await change.rows(), loaded, check), expired


async def seed(
    change: RegistryChange,
    loaded: Loaded,
    check: Check,
    facets: Iterable[Facet],
    registrations: Iterable[Registration],
) -> tuple[Loaded, None]:
    """See `Registry.seed`."""
    wanted = facets_to_seed(loaded, facets)
    for facet in wanted:
        await change.put_facet(facet.name, facet.model_dump_json())
    catalog = {**loaded.facets, **{facet.name: facet for facet in wanted}}
    fitting = [
        registration
        for registration in registrations_to_seed(loaded, registrations)
        if _fits(registration, catalog, check)
    ]
    for registration in fitting:
        await change.put_capability(
            registration.capability_id,
            registration.version,
            registration.model_dump_json(),
            _silence_max(registration),
        )
    if not (wanted or fitting):
        return loaded, None
    await change.bump()
    return read_rows(await change.rows(), loaded, check), None


def is_active(capability: Capability) -> bool:
    return capability.status is CapabilityStatus.ACTIVE


def shown(faults: Iterable[Fault]) -> str:
    """Faults for a line of the log."""
    return "; ".join(f"{fault.code} {fault.pointer} {fault.message}" for fault in faults)


def _is_builtin(registration: Registration) -> bool:
    return registration.kind is CapabilityKind.BUILTIN


def _silence_max(registration: Registration) -> timedelta | None:
    heartbeat = registration.heartbeat
    return None if heartbeat is None else timedelta(seconds=heartbeat.silence_max_s)


def _fits(registration: Registration, catalog: Mapping[str, Facet], check: Check) -> bool:
    """Whether a builtin can be registered; if not, the operator is told why."""
    try:
        capability = compile_registration(registration, catalog, datetime.now(UTC))
        faults: Iterable[Fault] = check(capability)
    except ContractError as error:
        faults = error.faults
    if faults:
        name = f"{registration.capability_id} {registration.version}"
        log.error("builtin %s is left out: %s", name, shown(faults))
    return not faults


def _unknown_dependencies(facet: Facet, catalog: Mapping[str, Facet]) -> list[Fault]:
    return [
        Fault(
            "FACET_NOT_FOUND",
            f"no facet {name!r} is known",
            f"/metadata/depends_on/{index}",
            facet=name,
        )
        for index, name in enumerate(facet.metadata.depends_on)
        if name not in catalog
    ]


def _broken_by(after: Loaded, keys: list[CapabilityKey]) -> list[Fault]:
    """Why these capabilities would not compile any more; their pointers are not the request's."""
    faults = [
        replace(
            fault,
            pointer="",
            message=f"{capability_id} {version} at {fault.pointer}: {fault.message}",
            capability_id=capability_id,
        )
        for capability_id, version in keys
        for fault in after.skipped[capability_id, version]
    ]
    return faults[:FAULTS_SHOWN_MAX]
