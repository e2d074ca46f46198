"""The bench's own arithmetic: percentiles, goals, ratios by round, and tables."""

from __future__ import annotations

import random
from pathlib import Path
from uuid import UUID

import pytest

from app.domain.envelope import Envelope
from app.kit.ids import created_ms, new_id, run_day
from app.kit.json_gate import parse_json
from bench import against_peer, envelopes, growth, run, servers
from bench.stats import (
    Book,
    Goal,
    Ratio,
    figures_table,
    median_interval,
    percentile,
    shown,
    spread,
    table,
)


@pytest.mark.parametrize(
    ("q", "expected"), [(0.0, 1), (0.5, 3), (0.75, 4), (0.95, 5), (0.99, 5), (1.0, 5)]
)
def test_a_percentile_is_one_of_the_values(q: float, expected: float) -> None:
    assert percentile([5, 1, 4, 2, 3], q) == expected


def test_a_single_value_is_every_percentile() -> None:
    assert percentile([7.0], 0.01) == percentile([7.0], 0.99) == 7.0


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


@pytest.mark.parametrize(
    ("count", "expected"),
    # From the table of the sign test: a two-sided level of 0.05 at most.
    [(1, (1, 1)), (5, (1, 5)), (6, (1, 6)), (9, (2, 8)), (20, (6, 15)), (100, (40, 61))],
)
def test_a_median_lies_between_two_values(count: int, expected: tuple[int, int]) -> None:
    values = [float(value) for value in range(1, count + 1)]
    random.Random(count).shuffle(values)
    assert median_interval(values) == expected


def test_no_values_have_no_median() -> None:
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.0331, "0.033"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (-0.5, "-0.500"),
    ],
)
def test_figures_are_short(value: float, expected: str) -> None:
    assert shown(value) == expected


def test_a_spread_is_the_median_with_both_ends() -> None:
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00-3.00)"
    assert spread([3.0]) == "3.00"


@pytest.mark.parametrize(
    ("goal", "value", "expected"),
    [
        (Goal(0.5, 0.3), 0.3, "aim met"),
        (Goal(0.5, 0.3), 0.5, "must met"),
        (Goal(0.5, 0.3), 0.51, "not met"),
        (Goal(4, 8, "more"), 8, "aim met"),
        (Goal(4, 8, "more"), 4, "must met"),
        (Goal(4, 8, "more"), 3.9, "not met"),
    ],
)
def test_a_goal_is_met_at_its_bound(goal: Goal, value: float, expected: str) -> None:
    assert goal.verdict(value) == expected


def test_ratios_are_taken_within_a_round() -> None:
    book = Book([Ratio("r", "a", "b"), Ratio("never", "a", "c")])
    for a, b in ((10, 5), (30, 10), (40, 10)):
        book.add("a", "ms", a)
        book.add("b", "ms", b)
    (ratio,) = book.ratios()
    assert ratio.what == "r"
    assert ratio.values == [2, 3, 4]


def test_a_round_that_only_one_side_played_has_no_ratio() -> None:
    book = Book([Ratio("r", "a", "b")])
    book.add("a", "ms", 1, 2)
    book.add("b", "ms", 4)
    assert book.ratios()[0].values == [0.25]


def test_the_book_leaves_out_what_was_not_measured_and_replaces_what_is_made_anew() -> None:
    book = Book()
    book.add("empty", "s")
    book.replace("p99", "s", 1.0)
    book.replace("p99", "s", 2.0)
    assert [(figure.what, figure.values) for figure in book.figures()] == [("p99", [2.0])]
    assert book.as_dict() == {
        "figures": [{"what": "p99", "unit": "s", "median": 2.0, "values": [2.0]}],
        "ratios": [],
    }


def test_tables_are_aligned_or_markdown() -> None:
    rows = [("longer", "1"), ("b", "22")]
    assert table(("a", "n"), rows, markdown=False) == "a       n\nlonger  1\nb       22"
    assert table(("a", "n"), rows, markdown=True).splitlines() == [
        "| a      | n  |",
        "|--------|----|",
        "| longer | 1  |",
        "| b      | 22 |",
    ]


def test_a_figure_shows_its_goal_and_whether_it_is_met() -> None:
    book = Book()
    book.add("start", "s", 3.0, goal=Goal(4, 2))
    book.add("rate", "x", 2.0, goal=Goal(3, 5, "more"))
    first, second = figures_table(book.figures(), markdown=False).splitlines()[1:]
    assert first.split() == ["start", "3.00", "s", "<=", "4", "<=", "2", "must", "met"]
    assert second.split() == ["rate", "2.00", "x", ">=", "3", ">=", "5", "not", "met"]


def test_the_comparison_shows_both_sides() -> None:
    book = Book(
        [
            Ratio(line.what, line.ours, line.peers, line.goal)
            for line in (against_peer.RATE, against_peer.STEP)
        ]
    )
    book.add(against_peer.RATE.ours, "runs/s", 900)
    book.add(against_peer.RATE.peers, "runs/s", 100)
    (_, _, row) = against_peer.comparison(book, markdown=True).splitlines()
    assert "| 900 " in row
    assert "| 9.00 " in row
    assert row.endswith("| aim met |")


def test_results_are_read_from_what_a_script_says() -> None:
    said = 'noise\nRESULT {"workload": "W1", "n": 1}\nRESULT {"workload": "W1", "n": 2}\n'
    assert against_peer.results_in(said) == {"W1": {"workload": "W1", "n": 2}}


def test_a_folder_without_the_scripts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        against_peer.main(["--peers", str(tmp_path)])
    assert refused.value.code == 2
    assert "http_load.py" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--only", "nothing"], ["--only", ""], ["--rounds", "0"]])
def test_wrong_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        run.main(wrong)
    assert refused.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_bodies_have_the_size_that_is_asked_for() -> None:
    body = envelopes.encoded(envelopes.diamond(), at_least=2_048)
    assert 2_048 <= len(body) < 2_148
    assert len(servers.job_body(2_048)) == 2_048
    servers.Job.model_validate_json(servers.job_body(2_048))


@pytest.mark.parametrize(
    ("envelope", "nodes"),
    [
        (envelopes.diamond(), 4),
        (envelopes.chain(100), 100),
        (envelopes.wide(200), 202),
        (envelopes.wide(200, root=envelopes.gate_node()), 202),
    ],
)
def test_workloads_are_valid_envelopes(envelope: dict[str, object], nodes: int) -> None:
    found = Envelope.model_validate(parse_json(envelopes.encoded(envelope)))
    assert found.goal_graph is not None
    assert len(found.goal_graph.nodes) == nodes


def test_copied_runs_have_ids_of_the_same_day_in_the_order_of_time() -> None:
    model = new_id()
    ids = list(growth._ids(model, 1_000))
    assert {run_day(run_id) for run_id in ids} == {run_day(model)}
    assert len(set(ids)) == 1_000
    assert [created_ms(run_id) for run_id in ids] == sorted(created_ms(i) for i in ids)
    assert all(run_id.version == 7 and run_id.variant == model.variant for run_id in ids)
    assert max(created_ms(run_id) for run_id in ids) <= created_ms(model)


def test_a_copy_takes_the_new_id_everywhere() -> None:
    model, other = UUID(int=1), UUID(int=2)
    rows = [{"run_id": model, "seq": 1, "body": f'{{"run_id":"{model}"}}', "node_id": None}]
    assert list(growth.copies(rows, model, [other])) == [
        (other, 1, f'{{"run_id":"{other}"}}', None)
    ]
