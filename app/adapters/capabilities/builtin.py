"""The capability kind `builtin`: Python functions of this program, collected in packs.

A pack is a plain value: functions join it through its decorator, `bootstrap/` hands packs to the
adapter and registers their facets and registrations. Nothing here keeps state of its own.

    pack = Pack("texts")

    @pack.capability(capability_id="text.upper", version="1.0.0", display_name="Upper case",
                     summary="…", inputs=["text"], outputs=["text"], effect=Effect.PURE)
    def upper(call: Call) -> dict[str, Any]: ...
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter

from app.domain.capability import Capability, CapabilityKind, Cost, Effect, NodeKind, Registration
from app.domain.contract import ContractSpec
from app.domain.errors import Fault
from app.domain.facet import Facet
from app.ports import Call, CallFailed, CallRefused

logger = logging.getLogger(__name__)

SyncFunction = Callable[[Call], dict[str, Any]]
AsyncFunction = Callable[[Call], Awaitable[dict[str, Any]]]
F = TypeVar("F", bound=Callable[[Call], Any])

_contract_spec: TypeAdapter[ContractSpec] = TypeAdapter(ContractSpec)


@dataclass(frozen=True, slots=True)
class Builtin:
    """One registered function and how it is run; exactly one of the two functions is set."""

    registration: Registration
    sync: SyncFunction | None
    awaitable: AsyncFunction | None
    inline: bool


class Pack:
    """A named set of builtin capabilities with the facets that they speak of."""

    def __init__(self, name: str, facets: Iterable[Facet] = ()) -> None:
        self.name = name
        self._facets = {facet.name: facet for facet in facets}
        self._builtins: dict[tuple[str, str], Builtin] = {}

    @classmethod
    def union(cls, name: str, packs: Iterable[Pack]) -> Pack:
        """A pack with everything of the given ones; raises ValueError when two disagree."""
        joined = cls(name)
        for pack in packs:
            for facet in pack.facets():
                if joined._facets.setdefault(facet.name, facet) != facet:
                    raise ValueError(f"facet {facet.name!r} is defined twice, and differently")
            for builtin in pack.builtins():
                joined._add(builtin)
        return joined

    def capability(
        self,
        *,
        capability_id: str,
        version: str,
        display_name: str,
        summary: str,
        effect: Effect,
        inputs: Sequence[str] | None = None,
        input_schema: dict[str, Any] | None = None,
        outputs: Sequence[str] | None = None,
        output_schema: dict[str, Any] | None = None,
        node_kind: NodeKind = NodeKind.EXECUTION,
        cost_tier: int = 0,
        timeout_s: float = 60,
        max_attempts: int | None = None,
        inline: bool = False,
        instructions: str | None = None,
    ) -> Callable[[F], F]:
        """Register the decorated function and return it unchanged.

        Each side of the contract is a list of facet names or one JSON Schema. `inline` promises
        that a sync function takes well under 1 ms and never waits. Raises ValueError for a side
        with both or neither, an async function declared inline, and an id with its version twice.
        """

        def register(function: F) -> F:
            is_async = inspect.iscoroutinefunction(function)
            if is_async and inline:
                raise ValueError(f"{capability_id}: an async function can not be inline")
            registration = Registration(
                capability_id=capability_id,
                version=version,
                display_name=display_name,
                summary=summary,
                kind=CapabilityKind.BUILTIN,
                node_kind=node_kind,
                effect=effect,
                input_contract=_contract(capability_id, inputs, input_schema),
                output_contract=_contract(capability_id, outputs, output_schema),
                cost=Cost(tier=cost_tier),
                timeout_s=timeout_s,
                max_attempts=max_attempts,
                metadata={} if instructions is None else {"instructions": instructions},
            )
            self._add(
                Builtin(
                    registration=registration,
                    sync=None if is_async else function,
                    awaitable=function if is_async else None,
                    inline=inline,
                )
            )
            return function

        return register

    def _add(self, builtin: Builtin) -> None:
        key = (builtin.registration.capability_id, builtin.registration.version)
        if key in self._builtins:
            raise ValueError(f"capability {key[0]} {key[1]} is registered twice")
        self._builtins[key] = builtin

    def registrations(self) -> list[Registration]:
        """The registrations in the order of definition."""
        return [builtin.registration for builtin in self._builtins.values()]

    def facets(self) -> list[Facet]:
        """The facets that the pack brings, in the order given."""
        return list(self._facets.values())

    def builtins(self) -> list[Builtin]:
        """The registered functions in the order of definition."""
        return list(self._builtins.values())


class BuiltinAdapter:
    """Runs builtin capabilities: async functions here, sync ones in a thread unless inline.

    Cancelling a call stops an async function; a thread can not be stopped, its result is dropped.
    So sync functions must be bounded by their input, not by the call's deadline.
    """

    def __init__(self, packs: Iterable[Pack]) -> None:
        joined = Pack.union("all", packs)
        self._builtins = {
            (builtin.registration.capability_id, builtin.registration.version): builtin
            for builtin in joined.builtins()
        }

    def check(self, capability: Capability) -> list[Fault]:
        """Faults `unknown_builtin` (no such function here) and `config_unexpected`."""
        faults = []
        if capability.key not in self._builtins:
            text = f"this program has no builtin {capability.capability_id} {capability.version}"
            faults.append(_fault("unknown_builtin", text, "/capability_id", capability))
        if capability.registration.config:
            text = "a builtin capability takes no config"
            faults.append(_fault("config_unexpected", text, "/config", capability))
        return faults

    def inline(self, capability: Capability) -> SyncFunction | None:
        """The function itself when it was declared inline. What it raises, the caller maps."""
        builtin = self._builtins.get(capability.key)
        return builtin.sync if builtin is not None and builtin.inline else None

    def breaker_scope(self, capability: Capability, tenant_id: str) -> None:
        """Functions of this process have no far side."""
        return

    async def invoke(self, call: Call) -> dict[str, Any]:
        """Run the function; raises `CallFailed` with the function's own or `capability_error`, and
        `CallRefused`."""
        builtin = self._builtins.get(call.capability.key)
        if builtin is None:
            raise CallFailed(
                "unknown_builtin",
                f"this program has no builtin {call.capability.capability_id}",
                retryable=False,
            )
        try:
            output = await _run(builtin, call)
        except (CallFailed, CallRefused):
            raise
        except Exception as error:
            # The text of an unforeseen exception may carry data of the run: it goes to the log of
            # the operator, never into the journal.
            logger.warning("builtin %s failed", call.capability.capability_id, exc_info=True)
            raise CallFailed(
                "capability_error",
                f"{call.capability.capability_id} failed with {type(error).__name__}",
                retryable=False,
            ) from error
        if not isinstance(output, dict):
            raise CallFailed(
                "capability_garbage",
                f"{call.capability.capability_id} gave {type(output).__name__}, not an object",
                retryable=False,
            )
        return output


async def _run(builtin: Builtin, call: Call) -> dict[str, Any]:
    if builtin.awaitable is not None:
        return await builtin.awaitable(call)
    assert builtin.sync is not None
    if builtin.inline:
        return builtin.sync(call)
    return await asyncio.to_thread(builtin.sync, call)


def _contract(
    capability_id: str, facets: Sequence[str] | None, schema: dict[str, Any] | None
) -> ContractSpec:
    if (facets is None) == (schema is None):
        raise ValueError(f"{capability_id}: give each side as facet names or as one schema")
    if facets is not None:
        return _contract_spec.validate_python({"mode": "facets", "facets": list(facets)})
    return _contract_spec.validate_python({"mode": "json_schema", "schema": schema})


def _fault(code: str, message: str, pointer: str, capability: Capability) -> Fault:
    return Fault(code, message, pointer, capability_id=capability.capability_id)
