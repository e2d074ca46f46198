"""`flexrun cancel`, `pause` and `resume`: orders for a run, and whether they took effect.

A signal is accepted when it is durable and takes effect when whoever drives the run applies it. In
between the run may end by itself: what the journal says then is what counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from app.cli.client import DEFAULT_URL, Api, AsJson, Url, order, path_of
from app.cli.errors import ApiProblem, CliError, ExitCode, UsageError
from app.cli.inputs import assignment, json_or_file
from app.cli.next_steps import decisions, refusal, url_option
from app.cli.output import err, out, out_json
from app.cli.picture import TERMINAL_STATUSES
from app.cli.watch import print_result, watch, watch_on

DECISIONS = ("done", "retry", "fail")
WISHED = {"cancel": "cancelled", "pause": "paused", "resume": "running"}
EFFECT_TIMEOUT_S = 60.0
LOOK_FIRST_S = 0.05
LOOK_EVERY_S = 1.0
OPERATOR_VARIABLE = "USER"

RunId = Annotated[str, typer.Argument(help="Id of the run.", show_default=False)]
Note = Annotated[str | None, typer.Option(help="Why, for those who look later.")]
Operator = Annotated[
    str | None, typer.Option(metavar="ID", envvar=OPERATOR_VARIABLE, help="Who gives the order.")
]
ExpectedPlanVersion = Annotated[
    int | None, typer.Option(min=1, help="Refuse if the plan changed meanwhile.")
]
IdempotencyKey = Annotated[str | None, typer.Option(help="Orders with the same key act once.")]
Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Wait until it took effect, or only order it.")
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0, metavar="SECONDS", help="How long to wait at most.")
]


def cancel(
    run_id: RunId,
    note: Note = None,
    operator: Operator = None,
    expected_plan_version: ExpectedPlanVersion = None,
    idempotency_key: IdempotencyKey = None,
    wait: Wait = True,
    timeout: Timeout = EFFECT_TIMEOUT_S,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """End a run. Calls under way are cancelled; what is done stays.

    Exit code: 0 it is cancelled, 1 it ended otherwise or not in time, 2 refused, 3 no service.
    """
    body = _body(note, operator, expected_plan_version)
    with Api(url) as api:
        answer = _signalled(api, "cancel", run_id, body, idempotency_key)
        raise typer.Exit(_outcome(api, "cancel", answer, timeout if wait else None, as_json))


def pause(
    run_id: RunId,
    note: Note = None,
    operator: Operator = None,
    expected_plan_version: ExpectedPlanVersion = None,
    idempotency_key: IdempotencyKey = None,
    wait: Wait = True,
    timeout: Timeout = EFFECT_TIMEOUT_S,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Stop a run until it is resumed. The deadline of a paused run does not come closer.

    Exit code: 0 it is paused, 1 it ended first or not in time, 2 refused, 3 no service.
    """
    body = _body(note, operator, expected_plan_version)
    with Api(url) as api:
        answer = _signalled(api, "pause", run_id, body, idempotency_key)
        raise typer.Exit(_outcome(api, "pause", answer, timeout if wait else None, as_json))


def resume(
    run_id: RunId,
    nodes: Annotated[
        list[str] | None,
        typer.Option("--node", metavar="NODE=DECISION", help="retry, done or fail; repeatable."),
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option("--output", metavar="NODE=@FILE", help="JSON output of a node that is done."),
    ] = None,
    note: Note = None,
    operator: Operator = None,
    expected_plan_version: ExpectedPlanVersion = None,
    idempotency_key: IdempotencyKey = None,
    wait: Wait = True,
    timeout: Timeout = EFFECT_TIMEOUT_S,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Go on with a run: one that is paused, awaits a human, failed or was cancelled.

    A run that awaits a human needs a decision for every node that waits.
    A failed or cancelled run stays as it is: a new run keeps what is done.

    Exit code: 0 it goes on, 1 not in time or otherwise, 2 refused, 3 no
    service; of a new run, which is watched, as of `flexrun run`.
    """
    body = _body(note, operator, expected_plan_version)
    if nodes or outputs:
        body["nodes"] = _decided(nodes or (), outputs or ())
    with Api(url) as api:
        answer = _signalled(api, "resume", run_id, body, idempotency_key)
        if answer["signal_id"] is None and wait:
            if not as_json:
                _say_accepted(answer)
            code = watch(api, answer["run_id"], as_json=as_json)
        else:
            code = _outcome(api, "resume", answer, timeout if wait else None, as_json)
        raise typer.Exit(code)


def go_on(api: Api, run: dict[str, Any], key: str | None, *, as_json: bool) -> int:
    """`flexrun run --resume`: do what brings this run on, and watch it; the exit code.

    A run that awaits a human is only shown: what to decide is not ours.
    """
    run_id, status = run["run_id"], run["status"]
    if status == "done":
        raise _refused("resume", run, api.url)
    if status in ("paused", "failed", "cancelled"):
        body = _body(None, os.environ.get(OPERATOR_VARIABLE), None)
        answer = _signalled(api, "resume", run_id, body, key)
        if not as_json:
            _say_accepted(answer)
        if answer["signal_id"] is None:
            return watch(api, answer["run_id"], as_json=as_json)
        _await_effect(api, "resume", answer, EFFECT_TIMEOUT_S)
        run = api.get(path_of("runs", run_id))
    else:
        err(f"Run {run_id} is there already: it is {status}.")
    return watch_on(api, run, as_json=as_json)


def _body(
    note: str | None, operator: str | None, expected_plan_version: int | None
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "note": note,
        "operator": {"id": operator} if operator else None,
        "expected_plan_version": expected_plan_version,
    }
    return {name: value for name, value in body.items() if value is not None}


def _decided(nodes: Iterable[str], outputs: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Decisions by node, as they were typed."""
    decided: dict[str, dict[str, Any]] = {}
    for text in nodes:
        node_id, _, decision = assignment(text)
        if decision not in DECISIONS:
            raise UsageError(f"{text!r}: the decision is one of {', '.join(DECISIONS)}.")
        decided[node_id] = {"decision": decision}
    for text in outputs:
        node_id, _, value = assignment(text)
        if node_id not in decided:
            raise UsageError(f"--output is for {node_id!r}, which has no --node {node_id}=done.")
        decided[node_id]["output"] = json_or_file(f"the output of {node_id}", value)
    return decided


# --- giving the order -----------------------------------------------------------------------------


def _signalled(
    api: Api, kind: str, run_id: str, body: dict[str, Any], key: str | None
) -> dict[str, Any]:
    """The answer to an accepted signal; a refusal says what state the run is in."""
    try:
        return order(api, path_of("runs", run_id, kind), body, key)
    except ApiProblem as problem:
        raise _explained(api, kind, run_id, problem) from None


def _explained(api: Api, kind: str, run_id: str, problem: ApiProblem) -> CliError:
    if problem.code == "invalid_run_state":
        return _refused(kind, api.get(path_of("runs", run_id)), api.url)
    if problem.status == 422 and kind == "resume":
        run = api.get(path_of("runs", run_id))
        problem.hint = "\n".join(decisions(run, url_option(api.url))) or problem.hint
    return problem


def _refused(kind: str, run: dict[str, Any], url: str) -> CliError:
    said, hint = refusal(kind, run, url)
    return CliError(f"invalid_run_state: {said}", exit_code=ExitCode.USAGE, hint=hint)


# --- its effect -----------------------------------------------------------------------------------


def _outcome(
    api: Api, kind: str, answer: dict[str, Any], timeout_s: float | None, as_json: bool
) -> int:
    """Wait for the effect unless `timeout_s` is None, and say how the run stands; the exit code."""
    run_id = answer["run_id"]
    if timeout_s is None:
        if as_json:
            out_json(answer)
        else:
            _say_accepted(answer)
            out(f"Watch it: flexrun tail {run_id} -f{url_option(api.url)}")
        return ExitCode.OK
    try:
        if not as_json:
            _say_accepted(answer)
        outcome = _await_effect(api, kind, answer, timeout_s)
    except KeyboardInterrupt:
        err(f"The {kind} stays accepted.")
        return ExitCode.INTERRUPTED
    run = api.get(path_of("runs", run_id))
    if as_json:
        out_json(run)
    else:
        print_result(run, api.url)
    if outcome == "applied" or run["status"] == WISHED[kind]:
        return ExitCode.OK
    err(f"The {kind} had no effect: {outcome or 'the run ended first'}.")
    return ExitCode.FAILED


def _say_accepted(answer: dict[str, Any]) -> None:
    if answer["signal_id"] is not None:
        out(f"Accepted as signal {answer['signal_id']}.")
    else:
        old = answer["resumed_from"]
        out(f"Run {old['run_id']} goes on as run {answer['run_id']}.")


def _await_effect(api: Api, kind: str, answer: dict[str, Any], timeout_s: float) -> str | None:
    """What became of the signal; None when the run ended without it."""
    run_id, deadline = answer["run_id"], time.monotonic() + timeout_s
    pause_s = LOOK_FIRST_S
    while True:
        view = api.get(path_of("runs", run_id, "debug"))
        [signal] = [s for s in view["signals"] if s["signal_id"] == answer["signal_id"]]
        outcome: str | None = signal["outcome"]
        if outcome is not None or view["run"]["status"] in TERMINAL_STATUSES:
            return outcome
        if time.monotonic() >= deadline:
            raise CliError(
                f"The {kind} is accepted, but nobody applied it within {timeout_s:g} s.",
                hint="It stays accepted; whoever drives the run applies it. "
                f"Look: flexrun show {run_id} --debug{url_option(api.url)}",
            )
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, LOOK_EVERY_S)
