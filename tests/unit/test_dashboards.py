"""Rules and dashboard parse as PromQL and speak of metrics, labels and runbooks that exist.

`tests/integration/test_metrics.py` holds docs/METRICS.md against what a service answers; here it is
the list of what there is.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml

from docs.generate import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
RULES = yaml.safe_load((PROMETHEUS / "rules.yml").read_text("utf-8"))
DASHBOARD = json.loads((GRAFANA / "dashboard.json").read_text("utf-8"))
GUIDE = (ROOT / "docs" / "DEPLOYMENT.md").read_text("utf-8")
OF_PROMETHEUS = {"up": {"job", "instance"}}
OF_THE_PROCESS = {"process_cpu_seconds_total", "process_resident_memory_bytes"}
ADDED_BY_THE_SCRAPE = {"job", "instance"}


def known() -> dict[str, set[str]]:
    """Every series that the documents list, with its labels; a histogram has three."""
    page = (ROOT / "docs" / "METRICS.md").read_text("utf-8")
    rows = re.findall(r"^\| `(flexrun_\w+)` \| (\w+) \| (.*?)\| ", page, re.MULTILINE)
    series: dict[str, set[str]] = {}
    for name, kind, labels in rows:
        found = set(re.findall(r"`(\w+)`", labels)) | ADDED_BY_THE_SCRAPE
        if kind == "histogram":
            series |= {f"{name}_bucket": found | {"le"}}
            series |= {f"{name}_{end}": found for end in ("count", "sum")}
        else:
            series[name] = found
    return series | OF_PROMETHEUS | dict.fromkeys(OF_THE_PROCESS, ADDED_BY_THE_SCRAPE)


def alerts() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    for alert in alerts():
        yield alert["alert"], alert["expr"]
    for panel in panels():
        for target in panel["targets"]:
            # Grafana puts a range here; the parser only knows durations.
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m")


def used(expression: str) -> tuple[dict[str, set[str]], set[str]]:
    """The series of an expression with the labels that select them, and those it groups by."""
    selected: dict[str, set[str]] = {}
    grouped: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector) and node.name is not None:
            found = {matcher.name for matcher in node.matchers.matchers}
            selected.setdefault(node.name, set()).update(found)
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            grouped.update(node.modifier.labels)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return selected, grouped


@pytest.mark.parametrize(
    ("where", "expression"), [pytest.param(w, e, id=f"{w}: {e[:60]}") for w, e in expressions()]
)
def test_an_expression_speaks_of_what_exists(where: str, expression: str) -> None:
    series = known()
    selected, grouped = used(expression)

    assert selected, where
    assert set(selected) <= set(series)
    for name, labels in selected.items():
        assert labels <= series[name], (where, name)
    assert grouped <= set.union(*(series[name] for name in selected)), where


def test_series_inside_of_ranges_and_functions_are_found() -> None:
    selected, grouped = used('sum by (le) (rate(flexrun_x_bucket{a="b"}[5m])) / ignoring(c) y > 2')
    assert (selected, grouped) == ({"flexrun_x_bucket": {"a"}, "y": set()}, {"le"})


def test_every_metric_is_on_the_dashboard_or_in_a_rule() -> None:
    selected = {name for _, e in expressions() for name in used(e)[0]}
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in known()}
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for name in selected}

    assert families - shown == {"flexrun_event_loop_lag_seconds"}  # its worst is shown


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    _, _, section = GUIDE.partition("\n## Alerts\n")
    headings = re.findall(r"^### (\w+)$", section, re.MULTILINE)

    assert sorted(alert["alert"] for alert in alerts()) == sorted(headings)
    for alert in alerts():
        page, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert (ROOT / page).is_file()
        assert anchor == alert["alert"].lower()
        assert alert["labels"]["severity"] in ("info", "warning", "critical")
        assert alert["annotations"]["summary"]


def test_what_is_scraped_are_the_processes_of_the_compose_file() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    (job,) = config["scrape_configs"]
    targets = {target for group in job["static_configs"] for target in group["targets"]}
    commands = {name: service.get("command", []) for name, service in compose["services"].items()}

    assert config["rule_files"] == ["rules.yml"]
    assert job["job_name"] == "flexrun"  # rules and dashboard select by it
    assert targets == {
        f"{name}:{command[command.index('--port') + 1]}"
        for name, command in commands.items()
        if command[:1] == ["flexrun"] and "--port" in command
    }


def test_the_dashboard_can_be_imported_anywhere() -> None:
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["name"], variable["type"]) == ("datasource", "datasource")
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    cells = [
        (place["x"] + dx, place["y"] + dy)
        for place in places
        for dx in range(place["w"])
        for dy in range(place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on this machine")
@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("test", "rules", "rules.test.yml")],
    ids=" ".join,
)
def test_prometheus_own_tool_agrees(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
