"""Claims on a database without a service: what may be taken, in whose turn, and by one only."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from random import Random
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.events import Event, EventType
from app.domain.run import RunStatus
from app.journal.record import Append, RunHandle
from app.kit.clock import now_ms
from app.kit.ids import id_at, new_id
from app.store.append import NewRun
from app.store.claims import (
    LANE_WEIGHTS,
    TENANTS_MAX,
    Claim,
    Fairness,
    Wanted,
    claim_runs,
    read_new,
    something_waits,
)
from app.store.database import HotConnection, connect
from app.store.leases import leave
from tests.journal_kit import JournalKit, journal_kit

DAY_MS = 1_764_000_000_000
COLUMNS = ("run_id", "tenant_id", "epoch", "seq", "owner", "takes", "wake_at", "status", "lane")
UNFINISHED = ("queued", "running", "awaiting_human", "paused")
FINISHED = ("done", "failed", "cancelled")
PATIENCE_S = 60.0


@pytest.fixture
async def session(dsn: str) -> AsyncIterator[HotConnection]:
    """A worker's own connection."""
    connection = await connect(dsn)
    yield connection
    await connection.close()


def run_id(number: int) -> UUID:
    """The id of a run; a smaller number is an older run."""
    return id_at(DAY_MS + number)


Row = tuple[UUID, str, int, int, str | None, int, datetime | None, str, str]


def head(
    number: int,
    *,
    lane: str = "standard",
    tenant: str = "default",
    owner: str | None = None,
    takes: int = 0,
    wake_at: datetime | None = None,
    status: str = "queued",
) -> Row:
    """A row of run_heads; a queued one of the only tenant unless told otherwise."""
    return (run_id(number), tenant, 0, 1, owner, takes, wake_at, status, lane)


async def store(session: HotConnection, *heads: Row) -> None:
    await session.copy_records_to_table(
        "run_heads", records=heads, columns=COLUMNS, timeout=PATIENCE_S
    )


async def signal(session: HotConnection, number: int, outcome: str | None = None) -> None:
    """A stored cancel signal of a run."""
    await session.execute(
        """insert into signals (signal_id, run_id, tenant_id, kind, body, created_at, outcome)
        values ($1, $2, 'default', 'cancel', '{}', now(), $3)""",
        new_id(),
        run_id(number),
        outcome,
    )


def wanted(
    limit: int = 50,
    *,
    suspects: int = 1,
    dead: list[str] | None = None,
    strays: list[UUID] | None = None,
    not_these: list[UUID] | None = None,
) -> Wanted:
    return Wanted(limit, suspects, dead or [], strays or [], not_these or [])


async def claim(
    session: HotConnection, want: Wanted, fairness: Fairness | None = None, worker: str = "me"
) -> list[Claim]:
    """What one claim took, oldest run first."""
    found = await claim_runs(session, worker, want, fairness or Fairness())
    return sorted(found, key=lambda claim: claim.run_id)


def numbers(claims: list[Claim]) -> list[int]:
    """The claimed runs by their number."""
    return sorted((claim.run_id.int >> 80) - DAY_MS for claim in claims)


class TestWhatMayBeTaken:
    async def test_only_what_is_unfinished_ownerless_and_has_something_to_do(
        self, session: HotConnection
    ) -> None:
        now = datetime.now(UTC)
        past, future = now - timedelta(seconds=5), now + timedelta(hours=1)
        await store(
            session,
            head(1),
            head(2, owner="living"),
            head(3, status="awaiting_human"),
            head(4, status="awaiting_human", wake_at=past),
            head(5, status="running", wake_at=future),
            head(6, status="running", wake_at=past),
            head(7, status="paused"),
            head(8, status="paused"),
            head(9, status="paused"),
            head(10, status="running", owner="dead"),
            head(11, status="running", owner="living"),
            head(12, status="running", owner="me"),
            head(13, status="running", owner="me"),
            *(head(20 + i, status=status, wake_at=past) for i, status in enumerate(FINISHED)),
            *(head(30 + i, status=status) for i, status in enumerate(FINISHED)),
        )
        await signal(session, 7)
        await signal(session, 8, outcome="applied")
        await signal(session, 11)
        await signal(session, 30)
        want = wanted(suspects=0, dead=["dead"], strays=[run_id(12), run_id(11), run_id(31)])

        assert numbers(await claim(session, want)) == [1, 4, 6, 7, 10, 12]
        assert await claim(session, wanted(dead=["dead"])) == []

    async def test_a_claim_is_ours_alone_under_a_new_epoch(self, session: HotConnection) -> None:
        past = datetime.now(UTC) - timedelta(seconds=5)
        await store(session, head(1), head(2, owner="dead", status="running", wake_at=past))
        new, lost = await claim(session, wanted(dead=["dead"]))

        assert (new.epoch, new.seq, new.status, new.from_worker, new.takes) == (
            *(1, 1, "queued", None, 0),
        )
        assert (lost.epoch, lost.from_worker, lost.takes) == (1, "dead", 1)
        assert (new.is_new, lost.is_new) == (True, False)
        rows = await session.fetch("select owner, epoch, wake_at from run_heads")
        assert [tuple(row) for row in rows] == [("me", 1, None), ("me", 1, None)]

    async def test_runs_that_were_under_way_come_before_queued_ones(
        self, session: HotConnection
    ) -> None:
        past = datetime.now(UTC) - timedelta(seconds=5)
        queued = [head(i, lane="interactive") for i in range(10)]
        under_way = [
            head(100, owner="dead", status="running", lane="batch"),
            head(101, status="awaiting_human", wake_at=past, lane="batch"),
            head(102, status="paused", lane="batch"),
            head(103, owner="me", status="running", lane="batch"),
        ]
        await store(session, *queued, *under_way)
        await signal(session, 102)
        want = wanted(6, dead=["dead"], strays=[run_id(103)])

        assert numbers(await claim(session, want)) == [0, 1, 100, 101, 102, 103]

    async def test_a_signalled_run_in_the_queue_is_taken_once_and_at_once(
        self, session: HotConnection
    ) -> None:
        await store(session, *(head(i) for i in range(5)), head(99, lane="batch"))
        await signal(session, 99)
        [first] = await claim(session, wanted(1))

        assert numbers([first]) == [99]
        assert first.is_new
        assert numbers(await claim(session, wanted())) == [0, 1, 2, 3, 4]

    async def test_runs_that_the_process_starts_itself_are_left_to_it(
        self, session: HotConnection
    ) -> None:
        await store(session, head(1), head(2))
        ours = [run_id(1)]

        assert numbers(await claim(session, wanted(not_these=ours))) == [2]
        assert not await something_waits(session, ours)
        assert await something_waits(session, [])
        assert numbers(await claim(session, wanted())) == [1]
        assert not await something_waits(session, [])


class TestTakes:
    async def test_they_count_lost_owners_and_not_hand_overs(self, session: HotConnection) -> None:
        await store(session, head(1, status="running", owner="first"))
        [claimed] = await claim(session, wanted(dead=["first"]), worker="second")
        assert claimed.takes == 1
        assert await leave(session, "second") == 1
        [handed_over] = await claim(session, wanted(), worker="third")
        assert (handed_over.takes, handed_over.from_worker) == (1, None)
        [lost] = await claim(session, wanted(dead=["third"]), worker="fourth")
        assert (lost.takes, lost.from_worker, lost.epoch) == (2, "third", 4)
        [stray] = await claim(session, wanted(strays=[run_id(1)]), worker="fourth")
        assert (stray.takes, stray.from_worker, stray.epoch) == (2, "fourth", 5), "nobody was lost"

    async def test_a_run_that_lost_a_worker_is_taken_alone_of_its_kind(
        self, session: HotConnection
    ) -> None:
        suspects = [head(i, status="running", owner="dead", takes=1) for i in range(3)]
        healthy = [head(i, status="running", owner="dead") for i in range(10, 13)]
        await store(session, *suspects, *healthy, head(20))
        want = wanted(suspects=1, dead=["dead"])

        assert numbers(await claim(session, want)) == [0, 10, 11, 12, 20]
        assert await claim(session, wanted(suspects=0, dead=["dead"])) == []
        assert numbers(await claim(session, want)) == [1]
        assert numbers(await claim(session, want)) == [2]

    async def test_more_suspects_than_a_claim_takes_hold_up_nobody(
        self, session: HotConnection
    ) -> None:
        suspects = [head(i, status="running", owner="dead", takes=1) for i in range(30)]
        await store(session, *suspects, head(50, status="running", owner="dead"), head(60))

        assert numbers(await claim(session, wanted(5, dead=["dead"]))) == [0, 60]
        found = await claim(session, wanted(5, suspects=0, dead=["dead"]))
        assert numbers(found) == [50]


class TestLanes:
    async def test_full_lanes_share_by_weight_one_run_at_a_time(
        self, session: HotConnection
    ) -> None:
        for i, lane in enumerate(LANE_WEIGHTS):
            await store(session, *(head(10_000 * i + j, lane=lane) for j in range(700)))
        fairness = Fairness()
        taken: list[str] = []
        for _ in range(1_000):
            [claimed] = await claim_runs(session, "me", wanted(1), fairness)
            taken.append(claimed.lane)

        assert Counter(taken) == {"interactive": 600, "standard": 300, "batch": 100}
        for start in range(0, 1_000, 10):
            share = Counter(taken[start : start + 10])
            assert share == {"interactive": 6, "standard": 3, "batch": 1}

    @pytest.mark.parametrize("limit", [7, 20, 50])
    async def test_the_share_is_the_same_whatever_a_claim_takes(
        self, session: HotConnection, limit: int
    ) -> None:
        for i, lane in enumerate(LANE_WEIGHTS):
            await store(session, *(head(10_000 * i + j, lane=lane) for j in range(800)))
        fairness = Fairness()
        taken: Counter[str] = Counter()
        for _ in range(700 // limit):
            taken.update(c.lane for c in await claim(session, wanted(limit), fairness))

        whole = 700 // limit * limit
        assert sum(taken.values()) == whole
        assert abs(taken["interactive"] - whole * 0.6) <= 1
        assert abs(taken["standard"] - whole * 0.3) <= 1
        assert abs(taken["batch"] - whole * 0.1) <= 1

    async def test_a_lane_alone_gets_everything(self, session: HotConnection) -> None:
        await store(session, *(head(i, lane="batch") for i in range(60)))
        assert len(await claim(session, wanted(50))) == 50

    async def test_an_idle_lane_gathers_no_credit(self, session: HotConnection) -> None:
        await store(session, *(head(i, lane="interactive") for i in range(400)))
        fairness = Fairness()
        for _ in range(30):
            await claim_runs(session, "me", wanted(10), fairness)
        await store(session, *(head(1_000 + i, lane="batch") for i in range(100)))
        taken: Counter[str] = Counter()
        for _ in range(10):
            taken.update(c.lane for c in await claim(session, wanted(1), fairness))

        # Its next turn at once, and then one in seven: not the 50 that it did not ask for.
        assert taken["batch"] <= 2
        assert taken["interactive"] >= 8


@given(
    claims=st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(list(LANE_WEIGHTS)),
                st.sampled_from("abc"),
                st.floats(-1, 50),
                st.booleans(),
            ),
            max_size=8,
        ),
        max_size=8,
    ),
    random=st.randoms(use_true_random=False),
)
def test_fairness_depends_on_what_was_taken_and_not_on_the_order_it_came_in(
    claims: list[list[tuple[str, str, float, bool]]], random: Random
) -> None:
    fairness, shuffled = Fairness(), Fairness()
    for batch in claims:
        # No two runs of one claim stand at the same place.
        taken = [_taken(*one, place=place) for place, one in enumerate(batch)]
        cursors = dict(fairness.after)
        fairness.note(taken)
        random.shuffle(taken)
        shuffled.note(taken)

        assert fairness.served == pytest.approx(shuffled.served)
        assert fairness.after == shuffled.after
        assert max(fairness.served.values()) == 0.0
        assert min(fairness.served.values()) >= -1.0
        for lane in LANE_WEIGHTS:
            new = sorted((c.finish, c.tenant_id) for c in taken if c.is_new and c.lane == lane)
            assert fairness.after[lane] == (new[-1][1] if new else cursors[lane])


def _taken(lane: str, tenant: str, finish: float, is_new: bool, *, place: int) -> Claim:
    owner = None if is_new else "dead"
    return Claim(run_id(0), tenant, 1, 1, "queued", lane, 0, [], owner, finish + place * 100)


@given(waiting=st.lists(st.sets(st.sampled_from(["interactive", "standard"])), max_size=120))
def test_a_lane_that_waits_is_served_whatever_the_others_do(waiting: list[set[str]]) -> None:
    """`batch` always waits; the others come and go as they like."""
    fairness, since = Fairness(), 0
    for others in waiting:
        finish = {
            lane: fairness.served[lane] + 1 / LANE_WEIGHTS[lane] for lane in {*others, "batch"}
        }
        lane = min(finish, key=finish.__getitem__)
        fairness.note([_taken(lane, "a", finish[lane], True, place=0)])
        since = 0 if lane == "batch" else since + 1
        # A round of each of the others, and the round that they may be behind.
        assert since <= 2 * (6 + 3)


class TestTenants:
    @pytest.mark.parametrize("limit", [1, 50])
    async def test_ten_thousand_runs_of_one_do_not_delay_another(
        self, session: HotConnection, limit: int
    ) -> None:
        await store(session, *(head(i, tenant="big") for i in range(10_000)))
        await store(session, head(20_000, tenant="small"))
        fairness = Fairness()
        first_two = [
            c.tenant_id for _ in range(2) for c in await claim(session, wanted(limit), fairness)
        ]

        assert first_two.count("small") == 1
        assert len(first_two) == 2 * limit

    @pytest.mark.parametrize("limit", [1, 5, 50])
    async def test_tenants_take_turns(self, session: HotConnection, limit: int) -> None:
        """Whatever their ages are, nobody gets a run more than anybody else who waits."""
        for i, tenant in enumerate(("a", "b", "c", "d")):
            await store(session, *(head(10_000 * i + j, tenant=tenant) for j in range(60)))
        fairness = Fairness()
        taken: Counter[str] = Counter()
        for _ in range(100 // limit):
            taken.update(c.tenant_id for c in await claim(session, wanted(limit), fairness))
            assert max(taken.values()) - min(taken[t] for t in "abcd") <= 1
        assert sum(taken.values()) == 100

    async def test_the_oldest_of_a_tenant_comes_first(self, session: HotConnection) -> None:
        heads = [head(i, tenant="a" if i % 2 else "b") for i in range(100)]
        await store(session, *reversed(heads))
        fairness = Fairness()
        order: dict[str, list[UUID]] = {"a": [], "b": []}
        for _ in range(10):
            for claimed in await claim(session, wanted(10), fairness):
                order[claimed.tenant_id].append(claimed.run_id)

        assert all(found == sorted(found) and len(found) == 50 for found in order.values())

    @pytest.mark.parametrize(
        ("count", "limit"), [(TENANTS_MAX, 1), (TENANTS_MAX + 30, 50), (2 * TENANTS_MAX, 50)]
    )
    async def test_more_tenants_than_one_claim_looks_at_all_get_their_turn(
        self, session: HotConnection, count: int, limit: int
    ) -> None:
        names = [f"t{i:04}" for i in range(count)]
        for i, tenant in enumerate(names):
            await store(session, *(head(100 * i + j, tenant=tenant) for j in range(3)))
        fairness = Fairness()
        order: list[str] = []
        while len(order) < count:
            found = await claim_runs(session, "me", wanted(limit), fairness)
            assert found, f"nothing was claimed although {count - len(order)} tenants wait"
            order += [c.tenant_id for c in sorted(found, key=lambda c: c.finish)]
        assert order == (names + names)[: len(order)]
        while await something_waits(session, []):
            assert await claim_runs(session, "me", wanted(50), fairness)


class TestManyClaimers:
    async def test_eight_at_once_take_each_run_exactly_once(self, dsn: str) -> None:
        async with AsyncExitStack() as stack:
            sessions = [await connect(dsn) for _ in range(8)]
            for session in sessions:
                stack.push_async_callback(session.close)
            lanes = list(LANE_WEIGHTS)
            await store(
                sessions[0],
                *(head(i, lane=lanes[i % 3], tenant=f"t{i % 7}") for i in range(2_000)),
            )

            async def work(number: int) -> list[UUID]:
                fairness, taken = Fairness(), []
                session = sessions[number]
                while await something_waits(session, []):
                    # Half of them with room for one: both kinds have to get along.
                    limit = 50 if number % 2 else 1
                    found = await claim_runs(session, f"w{number}", wanted(limit), fairness)
                    taken += [claimed.run_id for claimed in found]
                return taken

            async with asyncio.timeout(60):
                taken = await asyncio.gather(*(work(number) for number in range(8)))
            everything = [found for one in taken for found in one]
            assert len(everything) == len(set(everything)) == 2_000
            rows = await sessions[0].fetch("select owner, epoch, run_id from run_heads")
            assert {row["epoch"] for row in rows} == {1}
            owner_of = {found: f"w{number}" for number, one in enumerate(taken) for found in one}
            assert {row["run_id"]: row["owner"] for row in rows} == owner_of

    async def test_locked_rows_are_skipped_and_not_waited_for(
        self, session: HotConnection, dsn: str
    ) -> None:
        past = datetime.now(UTC) - timedelta(seconds=5)
        await store(
            session,
            *(head(i) for i in range(5)),
            *(head(10 + i, status="running", owner="dead") for i in range(2)),
            *(head(20 + i, status="running", wake_at=past) for i in range(2)),
            *(head(30 + i, status="paused") for i in range(2)),
            *(head(40 + i, status="running", owner="me") for i in range(2)),
        )
        await signal(session, 30)
        await signal(session, 31)
        locked = [run_id(number) for number in (0, 1, 10, 20, 30, 40)]
        want = wanted(dead=["dead"], strays=[run_id(40), run_id(41)])
        other = await connect(dsn)
        async with other.transaction():
            await other.fetch("select from run_heads where run_id = any($1) for update", locked)
            # A claim that waited would end in the session's lock_timeout.
            assert numbers(await claim(session, want)) == [2, 3, 4, 11, 21, 31, 41]
            assert await something_waits(session, [])
        await other.close()
        again = wanted(dead=["dead"], strays=[run_id(40)])
        assert numbers(await claim(session, again)) == [0, 1, 10, 20, 30, 40]


class TestCost:
    @pytest.mark.parametrize("plans", ["force_custom_plan", "force_generic_plan"])
    async def test_no_claim_goes_through_all_heads(
        self, session: HotConnection, plans: str
    ) -> None:
        """Also not where an old plan is reused: finished runs are never looked at."""
        past = datetime.now(UTC) - timedelta(seconds=5)
        # The limits of a session are for what a claim does, not for a whole table.
        await session.execute("set statement_timeout = 0")
        await store(session, *(head(i, status="done") for i in range(100_000)))
        first = 200_000
        await store(
            session,
            *(head(first + i, lane=list(LANE_WEIGHTS)[i % 3]) for i in range(300)),
            *(head(first + 400 + i, status="running", owner="dead") for i in range(20)),
            *(head(first + 500 + i, status="awaiting_human", wake_at=past) for i in range(20)),
            *(head(first + 600 + i, status="paused") for i in range(20)),
        )
        for i in range(20):
            await signal(session, first + 600 + i)
        await session.execute("analyze run_heads; analyze signals", timeout=PATIENCE_S)
        await session.execute(f"reset statement_timeout; set plan_cache_mode = {plans}")
        before = await _sequential_scans(session)
        fairness, taken = Fairness(), 0
        for limit in (1, 1, 1, 50, 50, 50, 50, 50, 50, 50):
            taken += len(await claim(session, wanted(limit, dead=["dead"]), fairness))
            await something_waits(session, [])

        assert taken == 3 + 350
        assert await _sequential_scans(session) == before


async def _sequential_scans(session: HotConnection) -> int:
    await session.execute("select pg_stat_force_next_flush()")
    await session.execute("select pg_stat_clear_snapshot()")
    found: int = await session.fetchval(
        "select seq_scan from pg_stat_user_tables where relname = 'run_heads'"
    )
    return found


class TestReadNew:
    async def test_it_gives_envelope_trace_and_plans_by_version(
        self, session: HotConnection, dsn: str
    ) -> None:
        async with journal_kit(dsn) as kit:
            planned = await _queue(kit, '{"n": 1}', [(1, "{}"), (2, '{"p": 2}')])
            bare = await _queue(kit, '{"n": 2}', [])
            pruned = await _queue(kit, '{"n": 3}', [])
        await session.execute("update runs set envelope = null where run_id = $1", pruned)
        claims = await claim(session, wanted())
        found = await read_new(session, claims)

        assert {claimed.run_id for claimed in claims} == {planned, bare, pruned}
        assert found.keys() == {planned, bare}
        assert found[planned].envelope == '{"n": 1}'
        assert found[planned].traceparent == "00-0-0-01"
        assert found[planned].plans == [(1, "{}"), (2, '{"p": 2}')]
        assert found[bare].plans == []


async def _queue(kit: JournalKit, envelope: str, plans: list[tuple[int, str]]) -> UUID:
    """A queued run as the API stores it."""
    handle = RunHandle(new_id(), 0, 0, "0" * 32)
    new_run = NewRun(
        *("default", datetime.now(UTC), "o", None, None, envelope, "00-0-0-01", "standard")
    )
    data = {"objective": "o", "lane": "standard"}
    append = Append(
        [Event(EventType.RUN_QUEUED, data)], RunStatus.QUEUED, None, new_run=new_run, plans=plans
    )
    handle.stamp(append.events, now_ms())
    await kit.journal.record(handle, append)
    return handle.run_id
