"""What can go wrong for a person at the terminal, said in a sentence and with what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """How a command ended. Stable: scripts may branch on it."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    WAITING = 4
    CANCELLED = 5
    INTERRUPTED = 130


PORT_IN_USE = 4
"""Of `serve`, `api` and `worker`, which know no runs that wait."""

_LOOK_AGAIN = "Try again in a moment. What is wrong says: flexrun doctor"
_NEXT = {
    "FACET_NOT_FOUND": "Which facets there are: flexrun facets list",
    "UNKNOWN_FACET": "Which facets there are: flexrun facets list",
    "body_too_large": "The service decides the limit: FLEXRUN_ENVELOPE_BYTES_MAX",
    "breaker_not_found": "Which breakers there are: flexrun breakers",
    "capability_not_found": "Which capabilities there are: flexrun capabilities list",
    "database_unreachable": _LOOK_AGAIN,
    "draining": _LOOK_AGAIN,
    "facet_not_found": "Which facets there are: flexrun facets list",
    "idempotency_key_reused": "Use another --idempotency-key, or none.",
    "invalid_run_state": "Where the run stands: flexrun show RUN_ID",
    "internal_error": "The service's log tells more: look for the trace_id.",
    "missing_snapshot": "Its results are not kept any more. Run its envelope again: flexrun run",
    "not_ready": "What is wrong says: flexrun doctor",
    "plan_rejected": "Try changes without running them: flexrun plan",
    "run_not_found": "Which runs there are: flexrun runs",
    "server_busy": _LOOK_AGAIN,
    "stale_plan_version": "Look at the run again: flexrun show RUN_ID --plan",
    "submit_outcome_unknown": "Send it again with the same --idempotency-key.",
}


class CliError(Exception):
    """An expected error: printed without a traceback. `hint` says what to do next."""

    def __init__(
        self, message: str, *, exit_code: int = ExitCode.FAILED, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = int(exit_code)
        self.hint = hint


class UsageError(CliError):
    """The command can not be understood as it was given."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, exit_code=ExitCode.USAGE, hint=hint)


class Unreachable(CliError):
    """No answer from the service. `refused`: it was not even there to be asked."""

    def __init__(self, message: str, *, refused: bool = False, hint: str | None = None) -> None:
        super().__init__(message, exit_code=ExitCode.UNREACHABLE, hint=hint)
        self.refused = refused


class ApiProblem(CliError):
    """A problem that the service answered: `code: detail`, then one line a fault."""

    def __init__(self, status: int, body: dict[str, Any], retry_after_s: float) -> None:
        self.status = status
        self.code = str(body.get("code", "unknown"))
        self.retry_after_s = retry_after_s
        faults = body.get("errors") or []
        lines = [f"{self.code}: {body.get('detail', '')}", *map(fault_line, faults)]
        if body.get("trace_id"):
            lines.append(f"  trace_id {body['trace_id']}")
        super().__init__(
            "\n".join(lines), exit_code=_exit_of(status), hint=_next(self.code, faults)
        )


def _exit_of(status: int) -> ExitCode:
    if status == 503:
        return ExitCode.UNREACHABLE
    return ExitCode.FAILED if status >= 500 else ExitCode.USAGE


def _next(code: str, faults: Sequence[dict[str, Any]]) -> str | None:
    for name in (*(str(fault.get("code")) for fault in faults), code):
        if name in _NEXT:
            return _NEXT[name]
    return None


def fault_line(fault: dict[str, Any]) -> str:
    """One broken rule: where it is, what it says, and whose it is."""
    about = [
        f"{name} {fault[f'{name}_id']}" for name in ("node", "capability") if f"{name}_id" in fault
    ]
    if "facet" in fault:
        about.append(f"facet {fault['facet']}")
    where = fault.get("pointer") or "(whole)"
    named = f" ({', '.join(about)})" if about else ""
    return f"  {where}  {fault.get('code', '')}: {fault.get('message', '')}{named}"
