"""One call of a capability: from the permission of its breaker to a judged outcome.

Nodes are called through here (`execute.py`), and what a node calls itself (`tools.py`). Nothing
here knows of runs; what follows from an outcome, the domain decides.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from app.domain.capability import CapabilityKind
from app.domain.decide import Failure
from app.domain.errors import Fault
from app.kit import failpoints
from app.kit.background import Background
from app.kit.json_gate import JsonRefused, check_value
from app.orchestrator.run import Outcome
from app.ports import Breakers, Call, CallFailed, CallRefused, CapabilityAdapter, Refused

log = logging.getLogger("flexrun.execute")

ADAPTER_GRACE_S = 0.1
"""An adapter that keeps the deadline itself knows more of how the call ended: let it come first."""


@dataclass(frozen=True, slots=True)
class ExecutionLimits:
    """Bounds of one value (bytes of JSON) and of the back-off between attempts (ms)."""

    value_bytes_max: int = 2 * 1024 * 1024
    backoff_base_ms: int = 200
    backoff_max_ms: int = 30_000


class Invoker:
    """Makes calls and judges what comes back. One a process, for all tenants."""

    def __init__(
        self,
        adapters: Mapping[CapabilityKind, CapabilityAdapter],
        limits: ExecutionLimits,
        breakers: Breakers,
    ) -> None:
        self._adapters = adapters
        self._limits = limits
        self._breakers = breakers
        self._reports = Background()

    def run_inline(self, call: Call, function: Callable[[Call], dict[str, Any]]) -> Outcome:
        """The outcome of a function that never waits."""
        failpoints.hit("call.inline_before")
        started = time.perf_counter()
        try:
            output = function(call)
        except CallFailed as failed:
            outcome = self._failed(call, failed, started)
        except Exception as error:
            outcome = self._crashed(call, error, started)
        else:
            outcome = self._returned(call, output, started)
        failpoints.hit("call.inline_after")
        return outcome

    async def invoke(self, call: Call, timeout_s: float, tenant_id: str, holder: str) -> Outcome:
        """The outcome of a call that may take so long, as its breaker permits it.

        `holder` says who announces what the call does to breakers: `run_id:epoch`.
        """
        adapter = self._adapters[call.capability.registration.kind]
        scope = adapter.breaker_scope(call.capability, tenant_id)
        if scope is None:
            return await self._invoke(call, adapter, timeout_s)
        return await self._guarded(call, adapter, timeout_s, scope, holder)

    async def _guarded(
        self, call: Call, adapter: CapabilityAdapter, timeout_s: float, scope: str, holder: str
    ) -> Outcome:
        """The call as its breaker permits it; how it went is reported, whatever happens."""
        permit = await self._breakers.allow(scope, holder, timeout_s)
        if isinstance(permit, Refused):
            return Outcome(call.node_id, refused=permit)
        try:
            outcome = await self._invoke(call, adapter, timeout_s)
        except BaseException:
            # Cut off: no verdict. Not awaited by us any more, but a probe must be given back.
            self._reports.run(self._breakers.report(permit, None, holder))
            raise
        reported = await self._breakers.report(permit, _verdict(outcome), holder)
        outcome.transitions = tuple(t for t in (permit.transition, reported) if t is not None)
        return outcome

    async def _invoke(self, call: Call, adapter: CapabilityAdapter, timeout_s: float) -> Outcome:
        """Call the adapter within the time limit, and judge what comes back."""
        started = time.perf_counter()
        try:
            failpoints.hit("call.before")
            async with asyncio.timeout(timeout_s + ADAPTER_GRACE_S):
                output = await adapter.invoke(call)
            failpoints.hit("call.after")
        except TimeoutError:
            timed_out = CallFailed(
                "timeout",
                f"The call did not end within {timeout_s:g} s.",
                retryable=True,
                unknown_outcome=True,
                target_failed=True,
            )
            return self._failed(call, timed_out, started)
        except CallFailed as failed:
            return self._failed(call, failed, started)
        except CallRefused as refused:
            waits = Refused(refused.scope, 0, refused.retry_after_s)
            return Outcome(call.node_id, refused=waits)
        except Exception as error:
            return self._crashed(call, error, started)
        return self._returned(call, output, started)

    def _returned(self, call: Call, output: Any, started: float) -> Outcome:
        """The output after the strict JSON gate, the size limit and the output contract."""
        duration_ms = _since(started)
        contract = call.capability.output
        try:
            check_value(output)
            raw = orjson.dumps(output)
        except (JsonRefused, TypeError) as error:
            fault = Fault(
                "NOT_JSON", f"The output is no JSON value: {error}.", node_id=call.node_id
            )
            return self._invalid_output(call, (fault,), duration_ms)
        if len(raw) > self._limits.value_bytes_max:
            message = (
                f"The output has {len(raw)} bytes, {self._limits.value_bytes_max} are allowed."
            )
            failure = Failure("value_too_large", message, retryable=False, duration_ms=duration_ms)
            return Outcome(call.node_id, failure=failure)
        if not contract.is_valid(output):
            return self._invalid_output(call, tuple(contract.violations(output)), duration_ms)
        return Outcome(call.node_id, output=output, raw=raw, duration_ms=duration_ms)

    def _invalid_output(self, call: Call, faults: tuple[Fault, ...], duration_ms: float) -> Outcome:
        """The call ended, so its effect happened: only what may be repeated is tried again."""
        failure = Failure(
            "invalid_output",
            f"The output breaks the contract of {call.capability.capability_id}.",
            retryable=call.capability.registration.effect != "at_most_once",
            duration_ms=duration_ms,
            delay_ms=self._backoff_ms(call.attempt, None),
            faults=faults,
            scope="capability_output",
        )
        return Outcome(call.node_id, failure=failure)

    def _failed(self, call: Call, failed: CallFailed, started: float) -> Outcome:
        failure = Failure(
            failed.code,
            failed.message,
            retryable=failed.retryable,
            unknown_outcome=failed.unknown_outcome,
            target_failed=failed.target_failed,
            duration_ms=_since(started),
            delay_ms=self._backoff_ms(call.attempt, failed.retry_after_s),
            faults=failed.faults,
            scope="capability_output",
        )
        return Outcome(call.node_id, failure=failure)

    def _crashed(self, call: Call, error: Exception, started: float) -> Outcome:
        """An adapter let an exception out: our fault or the function's. Its text stays here."""
        log.error("call of %s crashed", call.capability.capability_id, exc_info=error)
        crashed = CallFailed(
            "capability_crashed",
            f"{call.capability.capability_id} raised {type(error).__name__}.",
            retryable=True,
            unknown_outcome=True,
            target_failed=None,
        )
        return self._failed(call, crashed, started)

    def _backoff_ms(self, attempt: int, retry_after_s: float | None) -> int:
        """Exponential with full jitter (Brooker, AWS, 2015), and what the far side asks for."""
        ceiling = min(
            self._limits.backoff_base_ms * 2 ** (attempt - 1), self._limits.backoff_max_ms
        )
        delay = random.uniform(0, ceiling)
        if retry_after_s is not None:
            delay += retry_after_s * 1000
        return int(delay)


def _verdict(outcome: Outcome) -> bool | None:
    """Whether the far side did its part; None when the outcome does not tell."""
    if outcome.failure is None:
        return True
    blamed = outcome.failure.target_failed
    return None if blamed is None else not blamed


def invalid_input(faults: tuple[Fault, ...]) -> Failure:
    """The inputs break the contract, which is found before the call."""
    return Failure(
        "invalid_input",
        "The inputs break the capability's contract; it was not called.",
        retryable=False,
        faults=faults,
        scope="capability_input",
    )


def _since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 3)
