"""The in-memory image of the registry."""

from __future__ import annotations

import random

import pytest

from app.domain.contract import ContractSpec
from app.domain.envelope import Envelope
from app.domain.errors import ContractError
from app.registry import image as image_module
from tests.registry_samples import capability, envelope, facet, image_of


def test_the_newest_registered_version_wins_not_the_highest() -> None:
    older = capability("a.b", version="9", age_s=1)
    newer = capability("a.b", version="2", age_s=2)
    image = image_of(newer, older)
    assert image.newest("a.b") is newer
    assert image.find("a.b", None) is newer
    assert list(image.active()) == [newer]


def test_inactive_versions_are_found_but_not_planned() -> None:
    active = capability("a.b", gives=["x"], version="1", age_s=1)
    stale = capability("a.b", gives=["y"], version="2", age_s=2, active=False)
    gone = capability("c", active=False)
    image = image_of(active, stale, gone)
    assert image.newest("a.b") is active
    assert image.get("a.b", "2") is stale
    assert image.get("a.b", "3") is None
    assert image.newest("c") is None
    assert image.is_known("c")
    assert not image.is_known("d")
    assert image.producers("x") == (active,)
    assert image.producers("y") == ()


def test_build_order_changes_nothing() -> None:
    found = [capability(f"c{i % 3}", gives=["x"], version=str(i)) for i in range(9)]
    expected = image_of(*found)
    for seed in range(5):
        random.Random(seed).shuffle(found)
        shuffled = image_of(*found)
        assert list(shuffled.active()) == list(expected.active())
        assert shuffled.producers("x") == expected.producers("x")
    assert [made.version for made in expected.active()] == ["6", "7", "8"]


def test_the_later_of_two_with_one_key_counts() -> None:
    first, second = capability("a", age_s=1), capability("a", age_s=2)
    assert image_of(first, second).get("a", "1") is second


def test_facets_are_named_by_name_before_key() -> None:
    name = facet("title")
    mail, blog = facet("mail", property_key="title"), facet("blog", property_key="headline")
    image = image_of(facets=[mail, blog, name])
    assert image.facets_named("title") == (name,)
    assert image.facets_named("headline") == (blog,)
    assert image.facets_named("nothing") == ()
    assert image_of(facets=[mail, facet("post", property_key="title")]).facets_named("title") == (
        mail,
        facet("post", property_key="title"),
    )


def _spec(made: Envelope) -> ContractSpec:
    return made.output_contract


def test_output_contracts_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    image = image_of(facets=["x", facet("given", direction="input")])
    specs = [
        _spec(envelope(output=["x"])),
        _spec(envelope(output={"schema": {"type": "object"}})),
        _spec(envelope()),
    ]
    compiled = [image.output_contract(spec) for spec in specs]
    assert [found.mode for found in compiled] == ["facets", "json_schema", "freeform"]
    assert all(image.output_contract(s) is c for s, c in zip(specs, compiled, strict=True))
    with pytest.raises(ContractError):
        image.output_contract(_spec(envelope(output=["given"])))
    monkeypatch.setattr(image_module, "CONTRACTS_KEPT_MAX", 3)
    fresh = image.output_contract(_spec(envelope(output={"schema": {"type": "array"}})))
    assert image.output_contract(specs[0]) is not compiled[0]
    assert image.output_contract(_spec(envelope(output={"schema": {"type": "array"}}))) is fresh


def test_a_facet_is_checked_on_whichever_side_it_stands() -> None:
    given, made = facet("given", direction="input"), facet("made", direction="output")
    image = image_of(facets=[given, made])
    for found in (given, made):
        contract = image.facet_contract(found)
        assert contract.is_valid({found.name: "text"})
        assert not contract.is_valid({found.name: 1})
