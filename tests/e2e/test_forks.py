"""A forked process is as good as one that was executed (`tests/forks.py`)."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.cli import Cli, Serving
from tests.forks import launch


@pytest.mark.parametrize(
    "args", [("version",), ("nonsense",), ("run", "-"), ("run", "-", "--url", "nowhere")]
)
def test_it_prints_and_ends_the_same(tmp_path: Path, args: tuple[str, ...]) -> None:
    cli = Cli(tmp_path, COLUMNS="80")
    assert vars(cli(*args, stdin="[")) == vars(cli.executed(*args, stdin="["))


@pytest.mark.parametrize("executed", [False, True])
def test_output_that_can_not_be_written_is_an_error(tmp_path: Path, executed: bool) -> None:
    env = Cli(tmp_path).env
    env.pop("PYTHONUNBUFFERED", None)
    with Path("/dev/full").open("wb") as full, (tmp_path / "said").open("wb") as said:
        process = launch(
            "version", env=env, stdout=full.fileno(), stderr=said.fileno(), executed=executed
        )
        assert process.wait(30) == 120
    assert "No space left on device" in (tmp_path / "said").read_text()


def test_it_has_its_own_folder_and_environment_and_takes_signals(tmp_path: Path, dsn: str) -> None:
    cli = Cli(tmp_path, DATABASE_URL=dsn)
    with Serving(cli, "--port", "0") as first, Serving(cli, "--port", "0") as second:
        assert first.process.pid != second.process.pid
        assert Path(f"/proc/{first.process.pid}/cwd").resolve() == tmp_path
        with pytest.raises(subprocess.TimeoutExpired):
            first.process.wait(0.0)
        first.process.send_signal(signal.SIGKILL)
        assert first.process.wait(30) == -signal.SIGKILL
        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(30) == 0
