"""The fault suite judges as it should: planted bugs are caught, plans and reports are whole.

The suite itself breaks everything at once and wants a machine of its own: `make chaos`. All planted
bugs: `python -m tests.chaos.mutants`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.chaos.mutants import MUTANTS, Mutant, Patch, judged
from tests.chaos.plan import SIZES, Fault, Size, make_plan
from tests.chaos.report import BEGIN, END, as_json, as_text, write_docs
from tests.chaos.rig import REPOSITORY
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.suite import Result
from tests.chaos.workload import order

QUICK = "an at_most_once call is repeated after a take-over"


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_planted_bug_is_caught() -> None:
    [mutant] = [mutant for mutant in MUTANTS if mutant.name == QUICK]
    assert (await judged(mutant.scenario, mutant)).violations


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_planted_bug_fits_the_code(mutant: Mutant, tmp_path: Path) -> None:
    """A mutant that matches nothing any more would be a control run under another name."""
    for patch in mutant.patches:
        (tmp_path / patch.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / "app" / patch.file, tmp_path / patch.file)
    mutant.apply(tmp_path)
    for patch in mutant.patches:
        changed = (tmp_path / patch.file).read_text()
        assert changed != (REPOSITORY / "app" / patch.file).read_text()


def test_a_bug_that_does_not_match_once_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("a = 1\na = 1\n")
    for old in ("a = 1", "b = 1"):
        with pytest.raises(ValueError, match="needs an update"):
            Patch("x.py", old, "a = 2").apply(tmp_path)


def test_there_are_enough_planted_bugs() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 12
    assert {mutant.scenario for mutant in MUTANTS} == SCENARIOS.keys()


def test_a_seed_decides_the_faults_and_the_envelopes() -> None:
    full = SIZES["full"]
    assert make_plan(7, full) == make_plan(7, full) != make_plan(8, full)
    assert order(7, 3) == order(7, 3) != order(7, 4)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_every_fault_is_in_every_size(size: Size) -> None:
    planned = {fault for fault in Fault for phase in make_plan(1, size) if phase.count(fault)}
    rare = {Fault.CUT_SESSIONS, Fault.HALF_OPEN_LINK} if size.name == "ci" else set()
    assert planned == set(Fault) - rare


def test_the_full_size_is_what_was_promised() -> None:
    size = SIZES["full"]
    plan = make_plan(1, size)

    def count(fault: Fault) -> int:
        return sum(phase.count(fault) for phase in plan)

    assert count(Fault.KILL_WORKER) >= 300
    assert count(Fault.KILL_API) >= 100
    assert count(Fault.KILL_POSTGRES) >= 50
    assert count(Fault.FREEZE) * size.frozen_at_once >= size.zombies >= 200
    assert (size.runs, size.events, size.reconnects) >= (5_000, 500_000, 2_000)


def test_the_report_goes_between_its_markers(tmp_path: Path) -> None:
    result = Result(3, "ci", {"runs": 1_234}, {"in all": 60.0}, {"clock": "not run"})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_docs(result, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| runs | 1,234 |" in text
    assert "old" not in text
    assert b'"runs": 1234' in as_json(result)
    assert "1,234" in as_text(result)
    (tmp_path / "bare.md").write_text("no place")
    with pytest.raises(ValueError, match="no place"):
        write_docs(result, tmp_path / "bare.md")
