"""From stored rows to an image: every registration compiled against the facets of its revision.

Pure functions, for `registry.py`. What can not be read or compiled is left out and named, it never
stops the rest. What did not change since the last load is not compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property

from pydantic import ValidationError

from app.domain.capability import Capability, CapabilityStatus, Registration
from app.domain.contract import Contract, ContractSpec, FacetsContract, compile_contract
from app.domain.errors import ContractError, Fault
from app.domain.facet import Facet, Side
from app.registry.image import RegistryImage
from app.store.registry import CapabilityKey, CapabilityRow, RegistryRows

Check = Callable[[Capability], list[Fault]]
"""What is wrong with a registration's config; see `CapabilityAdapter.check`."""


@dataclass(frozen=True)
class Loaded:
    """One revision in memory; stored revisions start at 1, 0 is before anything was loaded.

    `bodies` are the stored texts of all capabilities, also of those left out. `refused` can not be
    run by this process, so the image shows them as inactive. `skipped` were left out, with reasons.
    """

    revision: int = 0
    facets: Mapping[str, Facet] = field(default_factory=dict)
    capabilities: Mapping[CapabilityKey, Capability] = field(default_factory=dict)
    facet_bodies: Mapping[str, str] = field(default_factory=dict)
    bodies: Mapping[CapabilityKey, str] = field(default_factory=dict)
    refused: frozenset[CapabilityKey] = frozenset()
    skipped: Mapping[CapabilityKey, list[Fault]] = field(default_factory=dict)

    @cached_property
    def image(self) -> RegistryImage:
        """Built when it is first asked for: a hundred registrations in a row build one."""
        return RegistryImage.build(self.revision, self.facets.values(), self.capabilities.values())

    def with_capability(self, revision: int, capability: Capability, body: str) -> Loaded:
        """The next revision, in which one capability was registered or registered again."""
        key = capability.key
        return replace(
            self,
            revision=revision,
            capabilities={**self.capabilities, key: capability},
            bodies={**self.bodies, key: body},
            refused=self.refused - {key},
            skipped={other: faults for other, faults in self.skipped.items() if other != key},
        )

    def has(self, row: CapabilityRow) -> bool:
        """Whether exactly this registration was loaded, be it to be left out."""
        return self.bodies.get(row.key) == row.body

    def capability_of(self, row: CapabilityRow) -> Capability | None:
        """The capability with the status and the times of a row; None when it is not known."""
        known = self.capabilities.get(row.key)
        return None if known is None else seen(known, row, is_refused=row.key in self.refused)


NOTHING = Loaded()


def read_rows(rows: RegistryRows, earlier: Loaded, check: Check) -> Loaded:
    """The rows as an image; work done for `earlier` is used again where nothing changed."""
    facets = {
        name: facet
        for name, body in rows.facets.items()
        if (facet := _facet_of(name, body, earlier)) is not None
    }
    changed_facets = {
        name
        for name in rows.facets.keys() | earlier.facet_bodies.keys()
        if rows.facets.get(name) != earlier.facet_bodies.get(name)
    }
    found: dict[CapabilityKey, Capability] = {}
    refused: set[CapabilityKey] = set()
    skipped: dict[CapabilityKey, list[Fault]] = {}
    for row in rows.capabilities:
        try:
            capability, is_refused = _again(row, earlier, changed_facets) or _anew(
                row, facets, check
            )
        except ValidationError:
            skipped[row.key] = [Fault("STORED_ROW_INVALID", "the stored body is not understood")]
        except ContractError as error:
            skipped[row.key] = list(error.faults)
        else:
            if is_refused:
                refused.add(row.key)
            found[row.key] = seen(capability, row, is_refused=is_refused)
    return Loaded(
        revision=rows.revision,
        facets=facets,
        capabilities=found,
        facet_bodies=rows.facets,
        bodies={row.key: row.body for row in rows.capabilities},
        refused=frozenset(refused),
        skipped=skipped,
    )


def compile_registration(
    registration: Registration, facets: Mapping[str, Facet], at: datetime
) -> Capability:
    """The registration with both contracts compiled, active as of `at`.

    Raises `ContractError` with the faults of both sides; pointers are those of the registration.
    """
    compiled_input, compiled_output = compile_sides(
        registration.input_contract, registration.output_contract, facets
    )
    assert compiled_input is not None
    assert compiled_output is not None
    return Capability(
        registration=registration,
        input=compiled_input,
        output=compiled_output,
        status=CapabilityStatus.ACTIVE,
        registered_at=at,
        last_seen_at=at,
    )


def compile_sides(
    input_spec: ContractSpec | None, output_spec: ContractSpec | None, facets: Mapping[str, Facet]
) -> tuple[Contract | None, Contract | None]:
    """Both sides compiled, a side without a spec as None.

    Raises `ContractError` with the faults of both, under /input_contract and /output_contract.
    """
    faults: list[Fault] = []
    compiled: dict[Side, Contract | None] = {"input": None, "output": None}
    sides: list[tuple[Side, ContractSpec | None]] = [
        ("input", input_spec),
        ("output", output_spec),
    ]
    for side, spec in sides:
        if spec is not None:
            try:
                compiled[side] = compile_contract(spec, side, facets, f"/{side}_contract")
            except ContractError as error:
                faults += error.faults
    if faults:
        raise ContractError("The contracts do not compile.", faults=faults)
    return compiled["input"], compiled["output"]


def seen(capability: Capability, row: CapabilityRow, *, is_refused: bool = False) -> Capability:
    """The capability with the status and the times of its row."""
    status = CapabilityStatus.INACTIVE if is_refused else CapabilityStatus(row.status)
    return replace(
        capability,
        status=status,
        registered_at=row.registered_at,
        last_seen_at=row.last_seen_at,
    )


def _facets_of(registration: Registration) -> Iterable[str]:
    for spec in (registration.input_contract, registration.output_contract):
        if isinstance(spec, FacetsContract):
            yield from spec.facets


def _again(
    row: CapabilityRow, earlier: Loaded, changed_facets: set[str]
) -> tuple[Capability, bool] | None:
    """The capability as it was compiled before, and whether it was refused; None if it changed."""
    known = earlier.capabilities.get(row.key)
    if known is None or earlier.bodies.get(row.key) != row.body:
        return None
    if not changed_facets.isdisjoint(_facets_of(known.registration)):
        return None
    return known, row.key in earlier.refused


def _anew(row: CapabilityRow, facets: Mapping[str, Facet], check: Check) -> tuple[Capability, bool]:
    registration = Registration.model_validate_json(row.body)
    capability = compile_registration(registration, facets, row.registered_at)
    return capability, bool(check(capability))


def _facet_of(name: str, body: str, earlier: Loaded) -> Facet | None:
    """None for a body that is not understood: whoever needs the facet is skipped by name."""
    if earlier.facet_bodies.get(name) == body:
        return earlier.facets.get(name)
    try:
        return Facet.model_validate_json(body)
    except ValidationError:
        return None
