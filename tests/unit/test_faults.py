"""What pydantic says, as faults: exact pointers, and never a value of the input."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from app.api.faults import FAULTS_MAX, faults_of_validation
from app.domain.capability import Registration
from app.domain.envelope import Envelope
from app.domain.errors import Fault

REGISTRATION: dict[str, Any] = {
    "capability_id": "a",
    "version": "1",
    "display_name": "A",
    "summary": "A",
    "kind": "http",
    "effect": "pure",
    "input_contract": {"schema": {}},
    "output_contract": {"mode": "facets", "facets": ["a"]},
}


def faults(model: type[BaseModel], value: Any, prefix: str = "") -> list[Fault]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(value)
    return faults_of_validation(caught.value, prefix, value=value)


def places(model: type[BaseModel], value: Any) -> set[tuple[str, str]]:
    return {(fault.code, fault.pointer) for fault in faults(model, value)}


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"effect": "x"}, ("enum", "/effect")),
        ({"cost": {"tier": 10}}, ("less_than_equal", "/cost/tier")),
        ({"a/b~c": 1}, ("extra_forbidden", "/a~1b~0c")),
        ({"heartbeat": {}}, ("missing", "/heartbeat/interval_s")),
        ({"output_contract": {"facets": []}}, ("too_short", "/output_contract/facets")),
        ({"output_contract": {"mode": "facets"}}, ("missing", "/output_contract/facets")),
        (
            {"output_contract": {"mode": "facets", "facets": ["a"], "facets_": 1}},
            ("extra_forbidden", "/output_contract/facets_"),
        ),
        (
            {"output_contract": {"facets": ["a", "!"]}},
            ("string_pattern_mismatch", "/output_contract/facets/1"),
        ),
        ({"output_contract": {"facets": ["a", "a"]}}, ("value_error", "/output_contract/facets")),
        ({"output_contract": {"mode": "hunter2"}}, ("union_tag_invalid", "/output_contract")),
        ({"output_contract": {}}, ("union_tag_not_found", "/output_contract")),
        ({"output_contract": {"schema": 1}}, ("dict_type", "/output_contract/schema")),
    ],
)
def test_pointers_are_those_of_the_body(changes: dict[str, Any], place: tuple[str, str]) -> None:
    assert places(Registration, {**REGISTRATION, **changes}) == {place}


def test_names_of_union_members_are_no_part_of_a_pointer() -> None:
    envelope = {
        "objective": "o",
        "output_contract": {"instructions": "i"},
        "goal_graph": {"nodes": [{"id": "A", "capability": "a", "inputs": {"k": {"from": 3}}}]},
    }
    pointers = {fault.pointer for fault in faults(Envelope, envelope)}
    at = "/goal_graph/nodes/0/inputs/k"
    assert pointers <= {at, f"{at}/from", f"{at}/value"}
    assert f"{at}/from" in pointers


def test_a_bad_key_is_shown_at_its_object() -> None:
    envelope = {"objective": "o", "output_contract": {"instructions": "i"}, "inputs": {"": 1}}
    (fault,) = faults(Envelope, envelope)
    assert fault.pointer == "/inputs/"


def test_without_the_value_pointers_stay_close() -> None:
    with pytest.raises(ValidationError) as caught:
        Registration.model_validate({**REGISTRATION, "cost": {"tier": "x"}})
    (fault,) = faults_of_validation(caught.value, "/body")
    assert fault.pointer == "/body/cost/tier"


@pytest.mark.parametrize("value", ["hunter2", 7, None, ["hunter2"], {"hunter2": "hunter2"}])
def test_no_value_is_repeated(value: Any) -> None:
    body = dict.fromkeys(REGISTRATION, value) | {"output_contract": {"mode": "hunter2"}}
    for fault in faults(Registration, body):
        assert "hunter2" not in fault.message


def test_the_root_has_the_empty_pointer() -> None:
    assert faults(Registration, [1], "/x")[0].pointer == "/x"


def test_there_is_a_limit_to_complaints() -> None:
    body = {**REGISTRATION, **{f"field{number}": 1 for number in range(500)}}
    assert len(faults(Registration, body)) == FAULTS_MAX
    (fault,) = faults(Registration, {**REGISTRATION, "x" * 5_000: 1})
    assert len(fault.pointer) < 200
