"""The errors of Flexrun's own vocabulary.

Any floor may raise these; `api/errors.py` maps each to an HTTP status in one table, the CLI prints
them. No error here may carry a secret or a raw exception text of a library.

    FlexrunError
    ├── BadInput              the request can not be understood (malformed JSON, bad cursor)
    ├── Unprocessable         understood, but it breaks a rule; one fault a broken rule
    │   ├── ContractError     facets or schemas that do not compile
    │   ├── PlanRejected      a goal graph, draft or preview that verification refused
    │   └── IdempotencyMismatch   the key was used with another body
    ├── TooLarge              over a limit of the settings
    ├── NotFound              no such run, node, plan version, capability, facet
    ├── Conflict              the thing exists but is in another state than the request needs
    └── Unavailable           try again later (journal out of reach, draining, overload)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Fault:
    """One broken rule: a stable `code`, a sentence for people, and where it is (a JSON pointer)."""

    code: str
    message: str
    pointer: str = ""
    facet: str | None = None
    node_id: str | None = None
    capability_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fault as JSON, without the parts that do not apply."""
        found: dict[str, Any] = {
            "code": self.code,
            "pointer": self.pointer,
            "message": self.message,
        }
        for name in ("facet", "node_id", "capability_id"):
            if (value := getattr(self, name)) is not None:
                found[name] = value
        return found


class FlexrunError(Exception):
    """Base of all errors that a caller may see. `code` is stable, `detail` is for people."""

    code = "internal_error"

    def __init__(
        self,
        detail: str,
        *,
        code: str | None = None,
        faults: tuple[Fault, ...] | list[Fault] = (),
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or type(self).code
        self.faults = tuple(faults)
        self.extra = extra or {}


class BadInput(FlexrunError):
    code = "malformed_request"


class Unprocessable(FlexrunError):
    code = "invalid_request"


class ContractError(Unprocessable):
    code = "contract_invalid"


class PlanRejected(Unprocessable):
    code = "plan_rejected"


class IdempotencyMismatch(Unprocessable):
    code = "idempotency_key_reused"


class TooLarge(FlexrunError):
    code = "too_large"


class NotFound(FlexrunError):
    code = "not_found"


class Conflict(FlexrunError):
    code = "invalid_run_state"


class Unavailable(FlexrunError):
    """`retry_after_s` goes into the Retry-After header."""

    code = "unavailable"

    def __init__(self, detail: str, *, code: str | None = None, retry_after_s: int = 1) -> None:
        super().__init__(detail, code=code)
        self.retry_after_s = retry_after_s
