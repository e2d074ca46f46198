"""`flexrun run`: submit an envelope, or go on with a run of it, and watch it to its end."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

import typer

from app.cli.client import DEFAULT_URL, Api, AsJson, Url, order, path_of
from app.cli.errors import ApiProblem, CliError, ExitCode, UsageError
from app.cli.inputs import Inputs, Objective, Outputs, make_envelope
from app.cli.signals import go_on
from app.cli.watch import watch

Envelope = Annotated[
    str | None,
    typer.Argument(
        help="Envelope as a JSON file; - is standard input. With --resume also the id of a run.",
        show_default=False,
    ),
]


def run(
    envelope: Envelope = None,
    inputs: Inputs = None,
    outputs: Outputs = None,
    objective: Objective = None,
    label: Annotated[str | None, typer.Option(help="Label to find the run by.")] = None,
    deadline: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="When the run must have ended.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with this run, or with the newest run of the same envelope that is not "
            "done, instead of starting over.",
        ),
    ] = False,
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
        if resume and envelope is not None and _is_run_id(envelope):
            if inputs or outputs or objective or label or deadline:
                raise UsageError("A run that is named goes on as it was submitted.")
            found = api.get(path_of("runs", envelope))
            raise typer.Exit(go_on(api, found, idempotency_key, as_json=as_json))
        body = make_envelope(api, envelope, inputs, outputs, objective)
        if label is not None:
            body["metadata"] = {**(body.get("metadata") or {}), "label": label}
        if deadline is not None:
            body["constraints"] = {**(body.get("constraints") or {}), "deadline_s": deadline}
        if resume:
            found = _newest_unfinished(api, body)
            raise typer.Exit(go_on(api, found, idempotency_key, as_json=as_json))
        run_id = order(api, path_of("runs"), body, idempotency_key)["run_id"]
        raise typer.Exit(watch(api, run_id, as_json=as_json))


def _newest_unfinished(api: Api, envelope: dict[str, Any]) -> dict[str, Any]:
    """The newest run of this envelope that is not done. Raises a refusal when there is none."""
    try:
        found = api.post(path_of("runs", "find"), envelope)
    except ApiProblem as problem:
        if problem.code != "run_not_found":
            raise
        raise CliError(
            "There is nothing to resume: no run of this envelope is unfinished, failed or "
            "cancelled.",
            exit_code=ExitCode.USAGE,
            hint="Start one: the same command without --resume",
        ) from None
    run: dict[str, Any] = api.get(path_of("runs", found["run_id"]))
    return run


def _is_run_id(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False
