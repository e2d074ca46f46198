"""`flexrun capabilities import-mcp`: the tools of an MCP server as registrations, to look at."""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from app.cli.config import load_settings
from app.cli.errors import CliError, ExitCode, UsageError
from app.cli.output import out_json

_URL = re.compile(r"https?://", re.IGNORECASE)


def import_mcp(
    server: Annotated[
        str, typer.Argument(help="URL of an MCP server, or a name in FLEXRUN_MCP_FILE.")
    ],
    tool: Annotated[list[str] | None, typer.Option(help="Only this tool; repeatable.")] = None,
    effect: Annotated[
        str, typer.Option(help="pure, idempotent or at_most_once: your word, not the server's.")
    ] = "at_most_once",
    prefix: Annotated[
        str | None, typer.Option(help="Beginning of the ids; else the server or its host.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Sent along; repeatable.")
    ] = None,
    secret_header: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SECRET", help="The same, by a name in FLEXRUN_SECRETS_FILE; repeatable."
        ),
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="How long to wait.")] = 60.0,
) -> None:
    """Print registrations of the tools that an MCP server offers, each with its pin.

    Read them before you register them: flexrun capabilities import-mcp … | flexrun capabilities
    register -. The server is asked from this machine, with its settings.
    """
    config = _config_of(
        server, _pairs(header, "--header"), _pairs(secret_header, "--secret-header")
    )
    named = prefix or (urlsplit(server).hostname or "mcp" if "url" in config else server)
    found = _offered(config, effect, named, timeout_s)
    offered = {each["config"]["tool"] for each in found}
    if missing := sorted(set(tool or ()) - offered):
        raise CliError(f"The server offers no tool {', '.join(missing)}.")
    out_json([each for each in found if not tool or each["config"]["tool"] in tool])


def _config_of(
    server: str, headers: dict[str, str], secret_headers: dict[str, str]
) -> dict[str, Any]:
    """How the server is reached, as a registration says it."""
    given = {"headers": headers, "secret_headers": secret_headers}
    shown = {part: values for part, values in given.items() if values}
    if _URL.match(server):
        return {"url": server, **shown}
    if shown:
        raise UsageError("Headers are for servers with a URL.")
    return {"server": server}


def _pairs(given: list[str] | None, option: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in given or ()]
    if not all(name and mark for name, mark, _ in pairs):
        raise UsageError(f"{option} needs NAME=VALUE.")
    return {name: value for name, _, value in pairs}


def _offered(
    config: dict[str, Any], effect: str, prefix: str, timeout_s: float
) -> list[dict[str, Any]]:
    # Heavy, and only this command reaches out by itself: the others ask the service.
    import asyncio  # noqa: PLC0415

    from app.bootstrap import NotReady, offered_by_mcp  # noqa: PLC0415
    from app.domain.capability import Effect  # noqa: PLC0415
    from app.ports import CallFailed  # noqa: PLC0415

    try:
        as_declared = Effect(effect)
    except ValueError:
        raise UsageError(f"There is no effect {effect!r}: {', '.join(Effect)}.") from None
    asked = offered_by_mcp(
        load_settings(), config, effect=as_declared, prefix=prefix, timeout_s=timeout_s
    )
    try:
        found = asyncio.run(asked)
    except NotReady as error:
        raise CliError(f"{error.code}: {error.detail}", exit_code=ExitCode.USAGE) from None
    except CallFailed as failed:
        code = ExitCode.UNREACHABLE if failed.retryable else ExitCode.FAILED
        raise CliError(f"{failed.code}: {failed.message}", exit_code=code) from None
    return [each.model_dump(mode="json", exclude_unset=True) for each in found]
