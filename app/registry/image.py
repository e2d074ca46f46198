"""The registry as planner and executor see it: an immutable image in memory, never SQL.

Whoever keeps the registry builds a new image for each revision and swaps it in whole, so that a
plan is made, and a node is run, against one consistent state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import orjson

from app.domain.capability import Capability, CapabilityStatus
from app.domain.contract import (
    Contract,
    ContractSpec,
    FacetsContract,
    JsonSchemaContract,
    compile_contract,
)
from app.domain.facet import Facet, Side

CONTRACTS_KEPT_MAX = 512


class RegistryImage:
    """Facets and capabilities of one revision. Made by `build`; nothing in it changes.

    What is kept inside besides (compiled run contracts) is a cache: dropping it changes only time.
    """

    __slots__ = (
        "__weakref__",
        "_active",
        "_by_key",
        "_contracts",
        "_producers",
        "_versions",
        "capabilities",
        "facets",
        "revision",
    )

    revision: int
    facets: Mapping[str, Facet]
    capabilities: Mapping[tuple[str, str], Capability]

    def __init__(
        self,
        revision: int,
        facets: Mapping[str, Facet],
        capabilities: Mapping[tuple[str, str], Capability],
    ) -> None:
        self.revision = revision
        self.facets = MappingProxyType(dict(facets))
        self.capabilities = MappingProxyType(dict(capabilities))
        self._versions: dict[str, list[Capability]] = {}
        for capability in self.capabilities.values():
            self._versions.setdefault(capability.capability_id, []).append(capability)
        self._active = _newest_active(self._versions)
        self._producers = _producers(self._active.values())
        self._by_key: dict[str, tuple[Facet, ...]] = {}
        for name in sorted(self.facets):
            facet = self.facets[name]
            self._by_key[facet.key] = (*self._by_key.get(facet.key, ()), facet)
        self._contracts: dict[object, Contract] = {}

    @classmethod
    def build(
        cls, revision: int, facets: Iterable[Facet], capabilities: Iterable[Capability]
    ) -> RegistryImage:
        """The image of these facets and capabilities, in whatever order they come.

        Of two facets with one name, or two capabilities with one id and version, the later counts.
        """
        return cls(
            revision,
            {facet.name: facet for facet in facets},
            {capability.key: capability for capability in capabilities},
        )

    def get(self, capability_id: str, version: str) -> Capability | None:
        """This very version, also when it is inactive: plans that name it go on."""
        return self.capabilities.get((capability_id, version))

    def newest(self, capability_id: str) -> Capability | None:
        """The version to plan when none is named: of the active ones the last registered."""
        return self._active.get(capability_id)

    def find(self, capability_id: str, version: str | None) -> Capability | None:
        """This version, or the newest active one when none is named."""
        if version is None:
            return self.newest(capability_id)
        return self.get(capability_id, version)

    def is_known(self, capability_id: str) -> bool:
        """Whether any version was ever registered, active or not."""
        return capability_id in self._versions

    def active(self) -> Iterable[Capability]:
        """The newest active version of every capability, ordered by id."""
        return self._active.values()

    def producers(self, facet: str) -> tuple[Capability, ...]:
        """The newest active capabilities whose output names the facet, ordered by id."""
        return self._producers.get(facet, ())

    def facets_named(self, name: str) -> tuple[Facet, ...]:
        """The facet of this name; if there is none, all facets that stand under it as a key."""
        facet = self.facets.get(name)
        return (facet,) if facet is not None else self._by_key.get(name, ())

    def output_contract(self, spec: ContractSpec, pointer: str = "/output_contract") -> Contract:
        """A run's output contract, compiled once per spec. Raises `ContractError`."""
        return self._compiled(spec, "output", pointer)

    def facet_contract(self, facet: Facet) -> Contract:
        """The contract of an object that holds this one facet, to check a value given for it."""
        side: Side = "input" if facet.stands_on("input") else "output"
        return self._compiled(FacetsContract(facets=[facet.name]), side, "")

    def _compiled(self, spec: ContractSpec, side: Side, pointer: str) -> Contract:
        key = (side, _spec_key(spec))
        found = self._contracts.get(key)
        if found is None:
            found = compile_contract(spec, side, self.facets, pointer)
            # Specs come from callers, so the cache is bounded; starting over keeps it simple.
            if len(self._contracts) >= CONTRACTS_KEPT_MAX:
                self._contracts.clear()
            self._contracts[key] = found
        return found


def _newest_active(versions: Mapping[str, list[Capability]]) -> dict[str, Capability]:
    newest: dict[str, Capability] = {}
    for capability_id in sorted(versions):
        active = [
            found for found in versions[capability_id] if found.status is CapabilityStatus.ACTIVE
        ]
        if active:
            # The version decides between two of one moment, so that build order never does.
            newest[capability_id] = max(active, key=lambda c: (c.registered_at, c.version))
    return newest


def _producers(capabilities: Iterable[Capability]) -> dict[str, tuple[Capability, ...]]:
    found: dict[str, list[Capability]] = {}
    for capability in capabilities:
        for facet in capability.output.facets:
            found.setdefault(facet, []).append(capability)
    return {facet: tuple(makers) for facet, makers in found.items()}


def _spec_key(spec: ContractSpec) -> object:
    if isinstance(spec, FacetsContract):
        return tuple(spec.facets)
    if isinstance(spec, JsonSchemaContract):
        return orjson.dumps(spec.json_schema)
    return None
