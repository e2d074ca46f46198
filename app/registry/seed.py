"""What a starting program has to put into the registry: the facets and builtins of its packs.

- A facet that is not there is added. A newer version of a facet of the same owner replaces it. One
  version has one body: a pack that changed a facet without a new version is told so and not heard.
- A facet of another owner is the operator's: it stays, with a warning.
- A builtin is registered as this program has it, also over its earlier registration: what runs is
  this program's code. A registration of another kind under its id and version stays.
- Older versions go first, so that the newest version is the last registered one, which wins.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from app.domain.capability import Registration
from app.domain.facet import Facet
from app.registry.loaded import Loaded

log = logging.getLogger("flexrun.registry")

_PART = re.compile(r"[0-9]+|[A-Za-z]+")


def facets_to_seed(loaded: Loaded, facets: Iterable[Facet]) -> list[Facet]:
    """The facets to write, as they will be read back."""
    found = []
    for given in facets:
        facet = Facet.model_validate_json(given.model_dump_json())
        known = loaded.facets.get(facet.name)
        if known is None or _replaces(facet, known):
            found.append(facet)
    return found


def registrations_to_seed(
    loaded: Loaded, registrations: Iterable[Registration]
) -> list[Registration]:
    """The builtins to register, oldest version first."""
    found = []
    for registration in registrations:
        key = (registration.capability_id, registration.version)
        if loaded.bodies.get(key) == registration.model_dump_json():
            continue
        known = loaded.capabilities.get(key)
        if known is not None and known.registration.kind is not registration.kind:
            log.warning("builtin %s %s is registered as another kind: it stays", *key)
            continue
        found.append(registration)
    return sorted(found, key=lambda registration: version_order(registration.version))


def version_order(version: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts versions: numbers by value (1.9 before 1.10), words below numbers (rc before final)."""
    parts = _PART.findall(version)
    ordered = tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts)
    # The end of a version counts as a number below all: 1.0-rc1 < 1.0 < 1.0.1.
    return (*ordered, (1, -1, ""))


def _replaces(facet: Facet, known: Facet) -> bool:
    if facet == known:
        return False
    if facet.metadata.owner != known.metadata.owner:
        log.warning("facet %s is the operator's own: the program's is not used", facet.name)
        return False
    if facet.version == known.version:
        log.warning("facet %s changed without a new version: it stays as it was", facet.name)
        return False
    return version_order(facet.version) > version_order(known.version)
