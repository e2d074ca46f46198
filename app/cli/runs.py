"""`flexrun runs`, `show` and `tail`: looking at runs."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.text import Text

from app.cli.client import DEFAULT_URL, Api, AsJson, Params, Url, pages, path_of
from app.cli.errors import ExitCode
from app.cli.follow import Follower, Wanted
from app.cli.manifest import manifest
from app.cli.output import err, out, out_json
from app.cli.picture import picture_of
from app.cli.render import RUN_STYLES, event_line, plan_lines, table_lines, tree_lines
from app.cli.signals import RunId
from app.cli.watch import print_result

PAGE = 1_000
OBJECTIVE_CHARS_MAX = 80


def runs(
    status: Annotated[list[str] | None, typer.Option(help="Only these; repeatable.")] = None,
    label: Annotated[str | None, typer.Option(help="Only with this label.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """List runs, newest first."""
    with Api(url) as api:
        params = {"status": status, "label": label}
        found = pages(api, path_of("runs"), "runs", params, limit=limit)
    if as_json:
        out_json(found)
        return
    if not found:
        out("No runs.")
        return
    rows = [
        (
            run["run_id"],
            run["status"],
            run["created_at"][:19] + "Z",
            run["label"] or "",
            " ".join(run["objective"].split())[:OBJECTIVE_CHARS_MAX],
        )
        for run in found
    ]
    for line in table_lines(("run", "status", "created", "label", "objective"), rows):
        out(line)


def show(
    run_id: RunId,
    events: Annotated[bool, typer.Option("--events", help="Also its events.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Also its plan with the proof.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Everything the service knows, as JSON.")
    ] = False,
    with_manifest: Annotated[
        bool,
        typer.Option(
            "--manifest", help="What is done, left and failed, with every attempt, as JSON."
        ),
    ] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Show where a run stands: its nodes, errors, output, and what to do next."""
    with Api(url) as api:
        if debug:
            out_json(api.get(path_of("runs", run_id, "debug")))
            return
        run = api.get(path_of("runs", run_id))
        if with_manifest:
            out_json(manifest(run, stored_events(api, run_id, Wanted())))
            return
        if as_json:
            out_json(run)
            return
        _print_run(api, run, with_plan=plan)
        if events:
            out()
            for event in stored_events(api, run_id, Wanted()):
                out(event_line(event))
        print_result(run, api.url)


def _driver(lease: dict[str, Any]) -> str:
    """Who drives a running run, and whether that process is alive."""
    worker = lease["worker"]
    if worker is None:
        wake_at = lease["wake_at"]
        # A run that was given back has a time that is over: it is free at once.
        if wake_at is not None and datetime.fromisoformat(wake_at) > datetime.now(UTC):
            return f"nothing to do until {wake_at}, then a free worker goes on"
        return "driven by nobody for now: the next free worker takes it over"
    where = f"{lease['owner']} (pid {worker['pid']} on {worker['host']})"
    if worker["alive"]:
        return f"driven by {where}, which is alive"
    return f"held by {where}, which is gone: another worker takes it over"


def _print_run(api: Api, run: dict[str, Any], *, with_plan: bool) -> None:
    head = Text("run ")
    head.append(run["run_id"], style="bold")
    head.append(f"  {run['status']}", style=RUN_STYLES.get(run["status"], ""))
    out(head)
    out(run["objective"])
    times = [f"created {run['created_at']}"]
    if run["finished_at"]:
        times.append(f"finished {run['finished_at']}")
    if run["metadata"]["label"]:
        times.append(f"label {run['metadata']['label']}")
    out("  ".join(times))
    if run["status"] == "running":
        out(_driver(api.get(path_of("runs", run["run_id"], "debug"))["lease"]))
    plan = None
    if run["plan_version"] is not None and run["nodes"]:
        plan = api.get(path_of("runs", run["run_id"], "plans", str(run["plan_version"])))
        out()
        for line in tree_lines(picture_of(run, plan)):
            out(line)
    if with_plan and plan is not None:
        out()
        for line in plan_lines(plan):
            out(line)


def stored_events(
    api: Api, run_id: str, wanted: Wanted, after: int = 0
) -> Iterator[dict[str, Any]]:
    """The events that are there now."""
    while True:
        params: Params = {**wanted.params(), "after": after, "limit": PAGE}
        page = api.get(path_of("runs", run_id, "events"), params)
        yield from page["events"]
        if len(page["events"]) < PAGE:
            return
        after = page["next_after"]


def tail(
    run_id: RunId,
    types: Annotated[
        list[str] | None,
        typer.Option("--type", metavar="TYPE", help="Such as NODE_DONE; repeatable."),
    ] = None,
    nodes: Annotated[
        list[str] | None, typer.Option("--node", metavar="NODE", help="Only this node; repeatable.")
    ] = None,
    levels: Annotated[
        list[str] | None,
        typer.Option("--level", metavar="LEVEL", help="INFO, WARN or ERROR; repeatable."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on live until the run ends.")
    ] = False,
    after: Annotated[int, typer.Option(min=0, metavar="SEQ", help="Only behind this event.")] = 0,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Print the events of a run. Filters combine; the last event of the run passes every one."""
    wanted = Wanted(
        tuple(name.upper() for name in types or ()),
        tuple(nodes or ()),
        tuple(name.upper() for name in levels or ()),
    )
    with Api(url) as api:
        follower = Follower(api, run_id, after=after, wanted=wanted, say=err)
        events = iter(follower) if follow else stored_events(api, run_id, wanted, after)
        try:
            for event in events:
                if as_json:
                    out_json(event, indent=None)
                else:
                    out(event_line(event))
        except KeyboardInterrupt:
            raise typer.Exit(ExitCode.INTERRUPTED) from None
