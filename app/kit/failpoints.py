"""Named points at which a test may kill this process, as a power cut would.

In service nothing is armed and `hit` is one comparison. A test arms a point with
`FLEXRUN_FAILPOINT=<name>[:<n>]`: the n-th time the point is reached the process kills itself.
The names are listed in `FAILPOINTS`; the crash test goes through all of them.
"""

from __future__ import annotations

import os
import signal

FAILPOINTS = (
    "submit.before_record",
    "submit.after_record",
    "claim.before_commit",
    "claim.after_commit",
    "commit.before_send",
    "commit.after_durable",
    "publish.before",
    "publish.after",
    "drive.before_first_record",
    "drive.before_record",
    "drive.after_record",
    "drive.before_finish_record",
    "drive.after_finish_record",
    "call.before",
    "call.after",
    "call.inline_before",
    "call.inline_after",
    "outcome.before_judged",
    "park.before_record",
    "park.after_record",
    "signal.before_commit",
    "signal.after_commit",
    "signal.before_apply",
    "recover.before_load",
    "recover.after_load",
    "stream.before_send",
    "stream.after_send",
)

_armed: str | None = None
_countdown = 0


def arm(spec: str) -> None:
    """Arm `name` or `name:n`. Raises ValueError for a name that no code hits."""
    global _armed, _countdown
    name, _, nth = spec.partition(":")
    if name not in FAILPOINTS:
        raise ValueError(f"no failpoint is called {name!r}")
    _armed, _countdown = name, int(nth or "1")


def hit(name: str) -> None:
    """Die here if a test wants it."""
    global _countdown
    if _armed is not None and _armed == name:
        _countdown -= 1
        if _countdown <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
