"""Registries over a real Postgres, for the tests of the registry."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from sqlalchemy import text

from app.adapters.capabilities.builtin import BuiltinAdapter, Pack
from app.domain.capability import Capability, CapabilityKind, Effect, Registration
from app.domain.errors import Fault
from app.ports import Call, CapabilityAdapter
from app.registry.registry import Registry
from app.store.database import Database
from app.store.registry import RegistryStore
from tests.registry_samples import facet


class AnyHttp:
    """Stands for the http adapter: refuses a registration whose config has `refuse`."""

    def check(self, capability: Capability) -> list[Fault]:
        if "refuse" in capability.registration.config:
            return [Fault("config_refused", "this config is refused", "/config/refuse")]
        return []


def registration(capability_id: str = "far.side", **changes: Any) -> Registration:
    return Registration.model_validate(
        {
            "capability_id": capability_id,
            "version": "1.0.0",
            "display_name": capability_id,
            "summary": "A server under test.",
            "kind": "http",
            "effect": "idempotent",
            "input_contract": {"facets": ["text"]},
            "output_contract": {"facets": ["summary"]},
            "heartbeat": {"interval_s": 10},
            **changes,
        }
    )


def pack(version: str = "1.0.0", **metadata: Any) -> Pack:
    """A builtin `text.upper` with the facet it speaks of."""
    made = Pack("texts", [facet("loud", **{"version": version, "owner": "flexrun", **metadata})])

    @made.capability(
        capability_id="text.upper",
        version=version,
        display_name="Upper",
        summary="Upper case.",
        effect=Effect.PURE,
        inputs=["loud"],
        outputs=["loud"],
        inline=True,
    )
    def upper(call: Call) -> dict[str, Any]:
        return {"loud": call.inputs["loud"].upper()}

    return made


def registry_over(database: Database, *packs: Pack) -> Registry:
    adapters = {
        CapabilityKind.BUILTIN: BuiltinAdapter(packs or [pack()]),
        CapabilityKind.HTTP: cast(CapabilityAdapter, AnyHttp()),
    }
    return Registry(RegistryStore(database), adapters, sweep_s=3600)


@asynccontextmanager
async def started(registry: Registry) -> AsyncIterator[Registry]:
    await registry.start()
    try:
        yield registry
    finally:
        await registry.close()


async def sql(database: Database, statement: str, **values: Any) -> Any:
    async with database.transaction() as connection:
        result = await connection.execute(text(statement), values)
        return result.all() if result.returns_rows else None


async def silence(database: Database, seconds: int) -> None:
    """Let every registered capability have been silent for so long, by the database clock."""
    await sql(
        database,
        "update capabilities set last_seen_at = last_seen_at - make_interval(secs => :s),"
        " expires_at = expires_at - make_interval(secs => :s)",
        s=seconds,
    )
