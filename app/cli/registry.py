"""`flexrun capabilities` and `flexrun facets`: what plans are made of."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from app.cli.client import DEFAULT_URL, Api, AsJson, Url, pages, path_of
from app.cli.errors import UsageError
from app.cli.inputs import parse_json, read_text
from app.cli.mcp import import_mcp
from app.cli.output import as_json as json_text
from app.cli.output import out, out_json
from app.cli.render import table_lines

capabilities = typer.Typer(
    help="Look up and register capabilities: list, show, register, import-mcp."
)
facets = typer.Typer(help="Look up facets: list, show.")


@capabilities.command("list")
def list_capabilities(
    status: Annotated[str | None, typer.Option(help="active or inactive.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """List capabilities with the facets that they take and make."""
    with Api(url) as api:
        params = {"status": status}
        found = pages(api, path_of("capabilities"), "capabilities", params, limit=sys.maxsize)
    if as_json:
        out_json(found)
        return
    rows = [
        (
            entry["capability_id"],
            entry["version"],
            entry["kind"],
            entry["effect"],
            entry["status"],
            ", ".join(entry["input_facets"]),
            ", ".join(entry["output_facets"]),
        )
        for entry in found
    ]
    for line in table_lines(
        ("capability", "version", "kind", "effect", "status", "takes", "makes"), rows
    ):
        out(line)


@capabilities.command("show")
def show_capability(
    capability_id: Annotated[str, typer.Argument(help="Id of the capability.")],
    version: Annotated[str | None, typer.Option(help="Else the newest active one.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Show one capability with its contracts."""
    with Api(url) as api:
        found = api.get(path_of("capabilities", capability_id), {"version": version})
    if as_json:
        out_json(found)
        return
    out(f"{found['capability_id']} {found['version']}  {found['display_name']}")
    out(found["summary"])
    out(f"{found['kind']}, {found['effect']}, {found['status']}, last seen {found['last_seen_at']}")
    for side, contract in found["contracts"].items():
        if contract is not None:
            out(f"\n{side}: {', '.join(contract['facets']) or contract['mode']}")
            out(json_text(contract["schema"]))


@capabilities.command("register")
def register_capability(
    file: Annotated[str, typer.Argument(help="File with a registration as JSON; - is stdin.")],
    url: Url = DEFAULT_URL,
) -> None:
    """Register a capability, or a list of them, for the first time or again."""
    body = parse_json(read_text(file), file)
    bodies = body if isinstance(body, list) else [body]
    if not all(isinstance(each, dict) for each in bodies):
        raise UsageError(f"{file} holds no registration: a JSON object, or a list, is needed.")
    with Api(url) as api:
        for each in bodies:
            found = api.post(path_of("capabilities"), each)
            out(f"Registered {found['capability_id']} {found['version']} ({found['status']}).")


capabilities.command("import-mcp")(import_mcp)


@facets.command("list")
def list_facets(as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """List the facet catalog."""
    with Api(url) as api:
        found = pages(api, path_of("facets"), "facets", {}, limit=sys.maxsize)
    if as_json:
        out_json(found)
        return
    rows = [
        (
            entry["name"],
            entry["metadata"]["version"],
            entry["metadata"]["direction"],
            entry["description"] or entry["title"],
        )
        for entry in found
    ]
    for line in table_lines(("facet", "version", "direction", "description"), rows):
        out(line)


@facets.command("show")
def show_facet(
    name: Annotated[str, typer.Argument(help="Name of the facet.")],
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Show one facet with its JSON Schema."""
    with Api(url) as api:
        found: dict[str, Any] = api.get(path_of("facets", name))
    if as_json:
        out_json(found)
        return
    out(f"{found['name']} {found['metadata']['version']}  {found['title']}")
    for line in (found["description"], found["semantics"]["instruction"]):
        if line:
            out(line)
    out(json_text(found["schema"]))
