"""Slots of limited capabilities: never more than the limit, and no waiting run is forgotten."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

from app.orchestrator.run import DrivenRun, Inbox
from app.orchestrator.slots import Slots
from tests.plans import plan_node


@dataclass
class Holder:
    """As much of a driven run as slots need."""

    inbox: Inbox = field(default_factory=Inbox)
    slots: dict[str, Any] = field(default_factory=dict)
    limited: Any = None

    @property
    def run(self) -> DrivenRun:
        return cast(DrivenRun, self)


NODE = plan_node("N", concurrency=1)
KEY = (NODE.capability_id, NODE.capability_version)


def woken(holder: Holder) -> bool:
    poked = holder.inbox.poked
    holder.inbox.take()
    return poked


async def test_who_waits_for_a_free_slot_is_woken_at_once() -> None:
    slots, holder = Slots(), Holder()
    slots.wait(holder.run, NODE)

    assert woken(holder)


async def test_slots_go_round_in_the_order_of_waiting() -> None:
    slots, first, second, third = Slots(), Holder(), Holder(), Holder()
    slots.take(first.run, NODE)
    assert slots.free({KEY: 1}) == {KEY: 0}
    slots.wait(second.run, NODE)
    slots.wait(third.run, NODE)
    assert not woken(second)

    slots.release(first.run, "N")
    assert woken(second)
    assert not woken(third)


async def test_a_slot_that_the_woken_run_can_not_use_is_passed_on() -> None:
    slots, first, second, third = Slots(), Holder(), Holder(), Holder()
    slots.take(first.run, NODE)
    slots.wait(second.run, NODE)
    slots.wait(third.run, NODE)
    slots.release(first.run, "N")
    assert woken(second)  # and it has filled its max_parallel meanwhile

    slots.pass_on()
    assert woken(third)


async def test_a_run_that_ends_leaves_its_slots_and_its_place_in_line() -> None:
    slots, first, second, third = Slots(), Holder(), Holder(), Holder()
    slots.take(first.run, NODE)
    slots.wait(second.run, NODE)
    slots.wait(third.run, NODE)
    slots.release_all(second.run)
    assert not woken(third)

    slots.release_all(first.run)
    assert woken(third)
    assert not woken(second)
    assert slots.free({KEY: 1}) == {KEY: 1}


async def test_releasing_twice_gives_back_once() -> None:
    slots, holder = Slots(), Holder()
    slots.take(holder.run, NODE)
    slots.release(holder.run, "N")
    slots.release(holder.run, "N")

    assert slots.free({KEY: 1}) == {KEY: 1}


async def test_a_call_that_no_plan_knows_of_waits_in_line_and_gives_its_slot_back() -> None:
    slots, first, second = Slots(), Holder(), Holder()
    slots.take(first.run, NODE)
    got, let_go = asyncio.Event(), asyncio.Event()

    async def call() -> None:
        async with slots.held(KEY, 1):
            got.set()
            await let_go.wait()

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    slots.wait(second.run, NODE)
    assert not got.is_set()
    slots.release(first.run, "N")
    await got.wait()
    assert slots.free({KEY: 1}) == {KEY: 0}
    assert not woken(second)
    let_go.set()
    await task
    assert woken(second)
    assert slots.free({KEY: 1}) == {KEY: 1}


async def test_a_call_that_is_cut_off_when_it_is_woken_passes_its_turn_on() -> None:
    slots, first, second = Slots(), Holder(), Holder()
    slots.take(first.run, NODE)

    async def call() -> None:
        async with slots.held(KEY, 1):
            raise AssertionError("it was cancelled")

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    slots.wait(second.run, NODE)
    slots.release(first.run, "N")
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert woken(second)
    assert slots.free({KEY: 1}) == {KEY: 1}
