"""The workflow on the code host does what `.ci/run` does, caches by the locks, keeps failures."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CI_RUN = ROOT / ".ci" / "run"


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = workflow["jobs"]["check-and-test"]["steps"]
    return found


def steps_that(steps: list[dict[str, Any]], word: str) -> list[dict[str, Any]]:
    """The steps whose command or action holds this word."""
    return [step for step in steps if word in str(step.get("run", step.get("uses")))]


def test_it_runs_what_a_developer_runs(steps: list[dict[str, Any]]) -> None:
    assert [step["run"] for step in steps_that(steps, ".ci/run")] == [".ci/run"]


def test_pip_is_cached_by_the_locks(steps: list[dict[str, Any]]) -> None:
    (setup,) = steps_that(steps, "actions/setup-python@")
    assert setup["with"]["cache"] == "pip"
    keys = setup["with"]["cache-dependency-path"].split()
    assert keys == ["requirements.txt", "requirements-dev.txt"]
    assert all((ROOT / key).is_file() for key in keys)


def test_what_a_failure_left_behind_is_uploaded(steps: list[dict[str, Any]]) -> None:
    (upload,) = steps_that(steps, "actions/upload-artifact@")
    assert upload["if"] == "failure()"
    assert "build/test-results/" in upload["with"]["path"].split()
    assert "--junitxml build/test-results/" in (ROOT / "Makefile").read_text("utf-8")


def test_golden_tests_have_a_step_of_their_own(steps: list[dict[str, Any]]) -> None:
    (golden,) = steps_that(steps, "tests/golden")
    assert "hashFiles" in golden["if"]


def test_it_may_only_read_and_stops_what_is_outdated(workflow: dict[str, Any]) -> None:
    assert workflow["permissions"] == {"contents": "read"}
    assert "cancel-in-progress" in workflow["concurrency"]
    assert all("permissions" not in job for job in workflow["jobs"].values())
    assert all(job["timeout-minutes"] <= 30 for job in workflow["jobs"].values())


def test_the_image_is_judged_by_the_status_of_the_run_and_not_of_a_node(
    workflow: dict[str, Any],
) -> None:
    (run,) = steps_that(workflow["jobs"]["image"]["steps"], "/v1/runs")
    assert "| jq -e '.status == \"done\"'" in run["run"]


def test_the_same_commands_work_by_hand() -> None:
    script = CI_RUN.read_text("utf-8")
    assert os.access(CI_RUN, os.X_OK)
    assert "set -euo pipefail" in script
    targets = re.findall(r"^(\w+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for target in re.findall(r"\bmake (\w+)$", script, re.MULTILINE):
        assert target in targets
    assert re.search(r"\bmake check$", script, re.MULTILINE)
    assert re.search(r"\bmake test\b", script)
