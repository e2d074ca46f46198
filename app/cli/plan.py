"""`flexrun plan`: what a run would do, and the proof that it fits, without running it."""

from __future__ import annotations

from app.cli.client import DEFAULT_URL, Api, AsJson, Url, path_of
from app.cli.errors import ApiProblem, ExitCode
from app.cli.inputs import EnvelopeFile, Inputs, Objective, Outputs, make_envelope
from app.cli.output import out, out_json
from app.cli.render import plan_lines

REJECTED = frozenset({"plan_rejected", "contract_invalid"})


def plan(
    envelope: EnvelopeFile = None,
    inputs: Inputs = None,
    outputs: Outputs = None,
    objective: Objective = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Plan an envelope and show why every input fits. Exit code 1 when no plan holds."""
    with Api(url) as api:
        body = make_envelope(api, envelope, inputs, outputs, objective)
        try:
            found = api.post(path_of("plans", "preview"), body)
        except ApiProblem as problem:
            if problem.code in REJECTED:
                problem.exit_code = ExitCode.FAILED
                problem.hint = None if problem.code == "plan_rejected" else problem.hint
            raise
    if as_json:
        out_json(found)
        return
    for line in plan_lines(found):
        out(line)
