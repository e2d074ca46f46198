"""`flexrun models`: what every configured provider offers at this moment, beside the catalog.

Asks the providers from this machine, with its variables; no service is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from app.cli.client import AsJson
from app.cli.config import load_settings
from app.cli.errors import ExitCode, UsageError
from app.cli.output import err, out, out_json
from app.cli.render import table_lines

if TYPE_CHECKING:
    from app.llm.catalog import Catalog, ProviderAccess
    from app.ports import Provider

NONE = "No provider is configured: models.yaml and its comments tell how."


@dataclass(frozen=True, slots=True)
class Inventory:
    """What one provider said. `detail`: why it said nothing. `unlisted`: what the catalog has of it
    that it did not name; some vendors do not list every name that they know."""

    provider: str
    kind: str
    status: Literal["answered", "failed", "not_configured"]
    detail: str = ""
    offered: dict[str, list[str]] = field(default_factory=dict)
    """The vendor's names, each with the names that the catalog has for it."""
    unlisted: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "provider": self.provider,
            "kind": self.kind,
            "status": self.status,
            "detail": self.detail or None,
            "models": [{"name": name, "catalog": names} for name, names in self.offered.items()],
            "unlisted": self.unlisted,
        }


def models(
    models_file: Annotated[
        Path | None,
        typer.Option("--file", help="The file of models. [FLEXRUN_MODELS_FILE, models.yaml]"),
    ] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds that a provider has to answer.")
    ] = 10.0,
    as_json: AsJson = False,
) -> None:
    """List what the providers of models offer now. Needs no service.

    Exit code: 0 all configured providers answered, 1 some did not, 2 the file of models is not
    valid.
    """
    found = _ask(models_file, timeout_s)
    if as_json:
        out_json([inventory.as_dict() for inventory in found])
    else:
        _print(found)
    has_failed = any(inventory.status == "failed" for inventory in found)
    raise typer.Exit(ExitCode.FAILED if has_failed else ExitCode.OK)


def _print(found: list[Inventory]) -> None:
    rows = [
        (inventory.provider, name, ", ".join(names))
        for inventory in found
        for name, names in inventory.offered.items()
    ]
    if rows:
        for line in table_lines(("provider", "model", "in the catalog"), rows):
            out(line)
    for inventory in found:
        if inventory.status == "failed":
            err(f"failed: {inventory.detail}")  # which names the provider
        elif inventory.status == "not_configured":
            err(f"{inventory.provider} is not configured: {inventory.detail}")
        elif inventory.unlisted:
            err(f"{inventory.provider} does not list {', '.join(inventory.unlisted)}")
    if all(inventory.status == "not_configured" for inventory in found):
        out(NONE)


def _ask(models_file: Path | None, timeout_s: float) -> list[Inventory]:
    # Heavy, and only this command speaks to providers.
    import asyncio  # noqa: PLC0415

    from app.bootstrap import open_catalog, open_providers  # noqa: PLC0415
    from app.llm.models_file import ModelsInvalid  # noqa: PLC0415

    async def ask_all() -> list[Inventory]:
        catalog = open_catalog(load_settings(models_file=models_file))
        opened = open_providers(catalog)
        try:
            return await asyncio.gather(
                *(
                    _inventory(catalog, access, opened.get(name), timeout_s)
                    for name, access in catalog.providers.items()
                )
            )
        finally:
            for provider in opened.values():
                await provider.aclose()

    try:
        return asyncio.run(ask_all())
    except ModelsInvalid as error:
        raise UsageError(f"{error.code}: {error.detail}") from None


async def _inventory(
    catalog: Catalog, access: ProviderAccess, provider: Provider | None, timeout_s: float
) -> Inventory:
    from app.domain.chat import LlmUnavailableError  # noqa: PLC0415 - see above

    if provider is None:
        return Inventory(access.name, access.kind, "not_configured", access.unavailable)
    try:
        offered = await provider.models(timeout_s)
    except (TimeoutError, LlmUnavailableError) as error:
        return Inventory(access.name, access.kind, "failed", str(error))
    known = {
        name: model.vendor_name
        for name, model in catalog.models.items()
        if model.provider == access.name
    }
    return Inventory(
        access.name,
        access.kind,
        "answered",
        offered={
            vendor_name: [name for name, called in known.items() if called == vendor_name]
            for vendor_name in offered
        },
        unlisted=[name for name, called in known.items() if called not in offered],
    )
