"""A process is said to be gone only where that is certain."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from app.kit import processes
from app.kit.processes import ProcessAddress, is_gone


@pytest.fixture
def gone() -> ProcessAddress:
    """A child that has ended and was waited for."""
    child = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(child, 0)
    return replace(ProcessAddress.own(), pid=child)


def test_who_ended_is_gone(gone: ProcessAddress) -> None:
    assert is_gone(gone)


def test_who_runs_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_gone(ProcessAddress.own())

    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not is_gone(ProcessAddress.own()), "there, and somebody else's"


@pytest.mark.parametrize("pid_space", [None, "another boot pid:[4026531836]"])
def test_pids_of_elsewhere_say_nothing(gone: ProcessAddress, pid_space: str | None) -> None:
    assert not is_gone(replace(gone, pid_space=pid_space))


@pytest.mark.parametrize("hidden", ["BOOT_ID", "PID_NAMESPACE"])
def test_where_the_system_hides_it_nobody_is_gone(
    gone: ProcessAddress, hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, hidden, Path("/nowhere"))
    assert ProcessAddress.own().pid_space is None
    assert not is_gone(gone)
    assert not is_gone(replace(gone, pid_space=None))
