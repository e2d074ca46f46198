"""`flexrun breakers`: which far sides are not called for now, and how to call one again at once."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli.client import DEFAULT_URL, Api, AsJson, Url, path_of
from app.cli.output import err, out, out_json
from app.cli.render import duration, table_lines

breakers = typer.Typer(help="Look up and reset circuit breakers: list, reset.")

OWN = "Redis is away: each process has breakers of its own for now, and only one was asked."


@breakers.command("list")
def list_breakers(as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """List the breakers of far sides that were called lately."""
    with Api(url) as api:
        answer = api.get(path_of("breakers"))
    found = answer["breakers"]
    if as_json:
        out_json(found)
        return
    if answer["degraded"]:
        err(OWN)
    if not found:
        out("This process knows no breakers.")
        return
    rows = [
        (
            entry["scope"],
            entry["status"],
            str(entry["failures"]),
            (entry["opened_at"] or "")[:19].replace("T", " "),
            duration(entry["retry_after_s"] * 1000) if entry["retry_after_s"] else "",
        )
        for entry in found
    ]
    for line in table_lines(("scope", "status", "failures", "opened (UTC)", "tried in"), rows):
        out(line)


@breakers.command("reset")
def reset_breaker(
    scope: Annotated[
        str,
        typer.Argument(metavar="SCOPE", help="As listed, such as tool::host.", show_default=False),
    ],
    url: Url = DEFAULT_URL,
) -> None:
    """Close a breaker: the next call goes through. Blocked nodes still wait for its cool-down."""
    with Api(url) as api:
        api.post(path_of("breakers", scope, "reset"), {})
    out(f"The breaker {scope} is closed.")
