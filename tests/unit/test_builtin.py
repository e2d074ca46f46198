"""The kind `builtin`: packs, and how their functions are run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from app.adapters.capabilities.builtin import BuiltinAdapter, Pack
from app.adapters.capabilities.pack import STANDARD_PACK
from app.domain.capability import CapabilityKind, Effect
from app.domain.contract import compile_contract
from app.ports import Call, CallFailed
from tests.capability_samples import call_of, compiled, http_capability

F = TypeVar("F", bound=Callable[[Call], Any])

ANY: dict[str, Any] = {"type": "object"}


def sample_pack() -> Pack:
    pack = Pack("sample")

    def named(capability_id: str, **more: Any) -> Callable[[F], F]:
        return pack.capability(
            capability_id=capability_id,
            version="1",
            display_name=capability_id,
            summary="a sample",
            input_schema=ANY,
            output_schema=ANY,
            effect=Effect.PURE,
            **more,
        )

    @named("where.sync")
    def where_sync(_call: Call) -> dict[str, Any]:
        return {"thread": threading.get_ident()}

    @named("where.inline", inline=True, instructions="be quick")
    def where_inline(_call: Call) -> dict[str, Any]:
        return {"thread": threading.get_ident()}

    @named("where.async")
    async def where_async(_call: Call) -> dict[str, Any]:
        return {"thread": threading.get_ident()}

    @named("fails.badly")
    def fails_badly(_call: Call) -> dict[str, Any]:
        raise KeyError("hunter2")

    @named("fails.well")
    async def fails_well(_call: Call) -> dict[str, Any]:
        raise CallFailed("busy", "come again", retryable=True, retry_after_s=3)

    @named("gives.list")
    def gives_list(_call: Call) -> Any:
        return [1]

    return pack


async def invoke(capability_id: str) -> dict[str, Any]:
    pack = sample_pack()
    found = {one.capability_id: one for one in pack.registrations()}
    return await BuiltinAdapter([pack]).invoke(call_of(compiled(found[capability_id]), {}))


async def test_sync_functions_run_in_a_thread_and_others_here() -> None:
    here = threading.get_ident()
    assert (await invoke("where.sync"))["thread"] != here
    assert (await invoke("where.inline"))["thread"] == here
    assert (await invoke("where.async"))["thread"] == here


async def test_an_exception_becomes_a_failure_without_its_text() -> None:
    with pytest.raises(CallFailed) as caught:
        await invoke("fails.badly")
    assert caught.value.code == "capability_error"
    assert not caught.value.retryable
    assert "KeyError" in caught.value.message
    assert "hunter2" not in caught.value.message


async def test_a_function_says_itself_what_may_be_repeated() -> None:
    with pytest.raises(CallFailed) as caught:
        await invoke("fails.well")
    assert (caught.value.code, caught.value.retryable) == ("busy", True)
    assert caught.value.retry_after_s == 3


async def test_only_objects_are_outputs() -> None:
    with pytest.raises(CallFailed, match="not an object"):
        await invoke("gives.list")


def test_only_inline_functions_are_handed_out() -> None:
    pack = sample_pack()
    adapter = BuiltinAdapter([pack])
    handed = {
        one.capability_id: adapter.inline(compiled(one)) is not None for one in pack.registrations()
    }
    assert [name for name, is_inline in handed.items() if is_inline] == ["where.inline"]


def test_check_knows_its_functions_and_takes_no_config() -> None:
    adapter = BuiltinAdapter([STANDARD_PACK])
    for registration in STANDARD_PACK.registrations():
        assert adapter.check(compiled(registration, STANDARD_PACK.facets())) == []
    faults = adapter.check(http_capability({"url": "https://example.org"}))
    assert [fault.code for fault in faults] == ["unknown_builtin", "config_unexpected"]


def test_wrong_registrations_are_refused_when_the_pack_is_made() -> None:
    pack = sample_pack()
    common: dict[str, Any] = {
        "version": "1",
        "display_name": "x",
        "summary": "x",
        "effect": Effect.PURE,
        "output_schema": ANY,
    }

    async def waits(_call: Call) -> dict[str, Any]:
        return {}

    with pytest.raises(ValueError, match="can not be inline"):
        pack.capability(capability_id="a", input_schema=ANY, inline=True, **common)(waits)
    with pytest.raises(ValueError, match="facet names or as one schema"):
        pack.capability(capability_id="a", **common)(waits)
    with pytest.raises(ValueError, match="registered twice"):
        pack.capability(capability_id="where.sync", input_schema=ANY, **common)(waits)


def test_the_standard_pack_compiles() -> None:
    catalog = {facet.name: facet for facet in STANDARD_PACK.facets()}
    ids = set()
    for registration in STANDARD_PACK.registrations():
        assert registration.kind is CapabilityKind.BUILTIN
        compile_contract(registration.input_contract, "input", catalog, "")
        compile_contract(registration.output_contract, "output", catalog, "")
        ids.add(registration.capability_id)
    assert ids == {
        "util.echo",
        "json.query",
        "document.outline",
        "document.key_points",
        "document.facts",
        "brief.compose",
        "brief.check",
    }
