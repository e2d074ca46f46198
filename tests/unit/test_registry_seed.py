"""The order of versions, by which a program's own facets and builtins replace each other."""

from __future__ import annotations

import itertools

from app.registry.seed import version_order

ASCENDING = [
    "0.9",
    "1.0.0-alpha",
    "1.0.0-rc1",
    "1.0.0-rc2",
    "1.0.0",
    "1.0.0.1",
    "1.9.0",
    "1.10.0",
    "2",
]


def test_versions_are_ordered_as_people_count() -> None:
    for older, newer in itertools.combinations(ASCENDING, 2):
        assert version_order(older) < version_order(newer), (older, newer)
