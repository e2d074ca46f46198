"""Where a process is, so that another one can tell that it is gone.

A pid means something only to those who share its table: one boot of one kernel, and in it one
namespace of pids, of which every container has its own (pid_namespaces(7), random(4)).
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True, slots=True)
class ProcessAddress:
    """`pid_space` is the same for processes that see each other's pids; None when not known."""

    host: str
    pid: int
    pid_space: str | None = None

    @classmethod
    def own(cls) -> ProcessAddress:
        return cls(socket.gethostname(), os.getpid(), _pid_space())


def is_gone(process: ProcessAddress) -> bool:
    """Whether a process is certainly no more: False also for one that can not be seen from here."""
    if process.pid_space is None or process.pid_space != _pid_space():
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is there, and not ours
        pass
    return False


def _pid_space() -> str | None:
    try:
        return f"{BOOT_ID.read_text().strip()} {PID_NAMESPACE.readlink()}"
    except OSError:  # no Linux, or a sandbox that hides it
        return None
