"""`flexrun run`: submit an envelope, watch it, print what came out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.client import DEFAULT_URL, Api, AsJson, Url, path_of
from app.cli.errors import ApiProblem, ExitCode, Unreachable
from app.cli.follow import Follower
from app.cli.inputs import EnvelopeFile, Inputs, Objective, Outputs, make_envelope
from app.cli.next_steps import next_steps
from app.cli.output import console, err, out, out_json
from app.cli.picture import WAITING_STATUSES, Picture
from app.cli.render import error_text, event_line, result_lines, tree_lines

if TYPE_CHECKING:
    from rich.console import Group

SUBMIT_TRIES_MAX = 4
EXIT_OF_STATUS = {
    "done": ExitCode.OK,
    "failed": ExitCode.FAILED,
    "cancelled": ExitCode.CANCELLED,
    "awaiting_human": ExitCode.WAITING,
    "paused": ExitCode.WAITING,
}


def run(
    envelope: EnvelopeFile = None,
    inputs: Inputs = None,
    outputs: Outputs = None,
    objective: Objective = None,
    label: Annotated[str | None, typer.Option(help="Label to find the run by.")] = None,
    deadline: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="When the run must have ended.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key and envelope give the same run.")
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Run an envelope, or make facets from inputs, and watch it.

    Exit code: 0 done, 1 failed, 2 usage or refused, 3 no service, 4 awaits a human, 5 cancelled.
    """
    with Api(url) as api:
        body = make_envelope(api, envelope, inputs, outputs, objective)
        if label is not None:
            body["metadata"] = {**(body.get("metadata") or {}), "label": label}
        if deadline is not None:
            body["constraints"] = {**(body.get("constraints") or {}), "deadline_s": deadline}
        accepted = submit(api, body, idempotency_key)
        run_id = accepted["run_id"]
        follower = Follower(api, run_id, say=err)
        try:
            _watch(api, follower, run_id, quiet=as_json)
        except KeyboardInterrupt:
            err(f"The run goes on. Watch it with: flexrun tail {run_id} -f --after {follower.seq}")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        finished = api.get(path_of("runs", run_id))
    if as_json:
        out_json(finished)
    else:
        print_result(finished, api.url)
    raise typer.Exit(EXIT_OF_STATUS.get(finished["status"], ExitCode.FAILED))


def submit(api: Api, envelope: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    """Submit once, however often it takes: under one idempotency key the run is made only once."""
    key = key or str(uuid.uuid4())
    tries = 1
    while True:
        try:
            accepted: dict[str, Any] = api.post(path_of("runs"), envelope, {"Idempotency-Key": key})
            return accepted
        except (Unreachable, ApiProblem) as error:
            pause_s = _worth_another_try(error)
            if pause_s is None or tries == SUBMIT_TRIES_MAX:
                raise
            err(f"{error.message} Sending it again in {pause_s:.0f} s.")
        tries += 1
        time.sleep(pause_s)


def _worth_another_try(error: Unreachable | ApiProblem) -> float | None:
    if isinstance(error, ApiProblem):
        return error.retry_after_s if error.status == 503 else None
    return None if error.refused else 1.0


def _watch(api: Api, follower: Follower, run_id: str, *, quiet: bool) -> None:
    """Follow the run until it ends or waits for a human."""
    picture = Picture(run_id)
    events = _seen(api, follower, picture)
    if quiet:
        for _ in events:
            pass
    elif console().is_terminal:
        _watch_live(picture, events)
    else:
        out(f"run {run_id}")
        for event in events:
            out(event_line(event))


def _seen(api: Api, follower: Follower, picture: Picture) -> Iterator[dict[str, Any]]:
    for event in follower:
        if event["type"] != "gap":
            picture.apply(event)
        if picture.lacks_nodes:
            plan = api.get(path_of("runs", picture.run_id, "plans", str(picture.plan_version)))
            picture.take_plan(plan["nodes"])
        yield event
        if picture.status in WAITING_STATUSES:
            return


def _watch_live(picture: Picture, events: Iterator[dict[str, Any]]) -> None:
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
