"""Watching a run to where it rests: its events as they come, its result, and what to do next.

For every command that waits for a run. Only looks: orders are given in `run.py` and `signals.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from app.cli.client import Api, path_of
from app.cli.errors import ExitCode
from app.cli.follow import Follower
from app.cli.next_steps import next_steps, url_option
from app.cli.output import console, err, out, out_json
from app.cli.picture import WAITING_STATUSES, Picture, picture_of
from app.cli.render import error_text, event_line, result_lines, tree_lines

if TYPE_CHECKING:
    from rich.console import Group

EXIT_OF_STATUS = {
    "done": ExitCode.OK,
    "failed": ExitCode.FAILED,
    "cancelled": ExitCode.CANCELLED,
    "awaiting_human": ExitCode.WAITING,
    "paused": ExitCode.WAITING,
}


def watch(api: Api, run_id: str, *, as_json: bool) -> int:
    """Watch a new run from its first event on until it ends or waits; the exit code."""
    return _watch(api, Picture(run_id), after=0, as_json=as_json)


def watch_on(api: Api, run: dict[str, Any], *, as_json: bool) -> int:
    """Watch on from a run resource: only what happens behind it is told."""
    if run["status"] in WAITING_STATUSES:
        return report(run, api.url, as_json=as_json)
    plan = None
    if run["plan_version"] is not None:
        plan = api.get(path_of("runs", run["run_id"], "plans", str(run["plan_version"])))
    return _watch(api, picture_of(run, plan), after=run["last_seq"], as_json=as_json)


def _watch(api: Api, picture: Picture, *, after: int, as_json: bool) -> int:
    run_id = picture.run_id
    # It has just taken the run, or shown it: should it not answer now, it is being restarted.
    follower = Follower(api, run_id, after=after, was_there=True, say=err)
    try:
        _show(picture, _seen(follower, picture), quiet=as_json)
        run = follower.get(path_of("runs", run_id))
    except KeyboardInterrupt:
        at = url_option(api.url)
        err(f"The run goes on. Watch it with: flexrun tail {run_id} -f --after {follower.seq}{at}")
        return ExitCode.INTERRUPTED
    return report(run, api.url, as_json=as_json)


def _seen(follower: Follower, picture: Picture) -> Iterator[dict[str, Any]]:
    for event in follower:
        if event["type"] != "gap":
            picture.apply(event)
        if picture.lacks_nodes:
            plan = follower.get(path_of("runs", picture.run_id, "plans", str(picture.plan_version)))
            picture.take_plan(plan["nodes"])
        yield event
        if event["type"] == "RUN_PAUSED":
            return


def _show(picture: Picture, events: Iterator[dict[str, Any]], *, quiet: bool) -> None:
    """Let the events pass, as a live picture on a terminal and as lines elsewhere."""
    if quiet:
        for _ in events:
            pass
    elif console().is_terminal:
        _show_live(picture, events)
    else:
        out(f"run {picture.run_id}")
        for event in events:
            out(event_line(event))


def _show_live(picture: Picture, events: Iterator[dict[str, Any]]) -> None:
    # Only for terminals.
    from rich.console import Group  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    def screen() -> Group:
        lines_max = max(console().height - 3, 5)
        head = Text(f"run {picture.run_id}  {picture.status}")
        return Group(head, *tree_lines(picture, lines_max=lines_max))

    with Live(console=console(), get_renderable=screen, refresh_per_second=10):
        for _ in events:
            pass


def report(run: dict[str, Any], url: str, *, as_json: bool) -> int:
    """Print a run that rests, for people or as JSON; the exit code that says how it stands."""
    if as_json:
        out_json(run)
    else:
        print_result(run, url)
    return EXIT_OF_STATUS.get(run["status"], ExitCode.FAILED)


def print_result(run: dict[str, Any], url: str) -> None:
    """How a run ended, what it made, and what to do next."""
    total = (run["timings"] or {}).get("total_ms")
    took = f" in {total / 1000:.2f} s" if total is not None else ""
    out()
    out(f"{run['status']}{took}, {run['last_seq']} events, run {run['run_id']}")
    if run["error"]:
        out(error_text(run["error"]))
    if run["output"] is not None:
        out()
        for line in result_lines(run["output"]):
            out(line)
    for line in next_steps(run, url):
        out(line)
