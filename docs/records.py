"""The guide of records, RECORDS.md: the fields come from the models, the advice from here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import BaseModel

from app.domain.record_shapes import RECORDS, EventLine, RecordKind
from docs.markdown import fields, first_line, page, table

TABLE = "create table log_lines (line jsonb)"
COPY = r"with (format csv, quote e'\x01', delimiter e'\x02')"


@dataclass(frozen=True)
class Guide:
    """What there is to say of a record besides its fields.

    `setting` is the name of the setting that turns it on; `query` aggregates lines in Postgres.
    """

    name: str
    shape: type[BaseModel]
    logger: str
    setting: str
    query: str
    healthy: str


GUIDES = (
    Guide(
        "event",
        EventLine,
        "flexrun.events",
        "log_events",
        """\
select line->>'capabilityId' as capability, line->>'status' as status, count(*) as attempts,
       percentile_cont(0.95) within group (order by (line->>'durationMs')::float) as p95_ms
from log_lines
where line->>'eventType' in ('NODE_DONE', 'NODE_RETRY', 'NODE_FAILED')
group by 1, 2 order by 1, 2;""",
        "Nearly all attempts are `done`. `pending` is an attempt that failed and is made again: "
        "more than one in fifty of a capability is worth a look at its `errorCode`. `failed` costs "
        "runs.",
    ),
    Guide(
        RecordKind.GENERATION,
        RECORDS[RecordKind.GENERATION],
        "flexrun.records",
        "log_generations",
        """\
select line->>'provider' as provider, line->>'model_id' as model, count(*) as calls,
       avg((line->>'outcome' = 'ok')::int) as ok,
       percentile_cont(0.95) within group (order by (line->>'latency_ms')::float) as p95_ms,
       sum((line->>'cost_usd')::numeric) as usd
from log_lines
where line->>'message' = 'generation'
group by 1, 2 order by 1, 2;""",
        "`ok` of at least 0.98 for each model. `invalid_json` and `schema_validation_failed` of "
        "more than 0.02 say that a model is too small for its prompts; `timeout` and "
        "`provider_busy` that its provider is. `unfinished` comes with deploys and cancelled runs, "
        "and hardly else.",
    ),
    Guide(
        RecordKind.FALLBACK,
        RECORDS[RecordKind.FALLBACK],
        "flexrun.records",
        "log_fallbacks",
        """\
select line->>'llm_outcome' as outcome, line->>'fallback_reason' as reason, count(*) as runs,
       count(*) / sum(count(*)) over () as share
from log_lines
where line->>'message' = 'fallback_metrics'
group by 1, 2 order by 3 desc, 1, 2;""",
        "Of the runs that asked a model: `success` at least 0.95, `error` at most 0.01, the rest "
        "`fallback`. One reason that grows names the cause. `deterministic_only` where you have "
        "configured models is a process that does not see its file of models.",
    ),
    Guide(
        RecordKind.LATENCY,
        RECORDS[RecordKind.LATENCY],
        "flexrun.records",
        "log_latencies",
        """\
select line->>'llm_enabled' as llm_enabled, step.key as step,
       percentile_cont(array[0.5, 0.95, 0.99]) within group (order by step.value::float) as ms
from log_lines,
     jsonb_each_text(line->'steps' || jsonb_build_object('total_ms', line->'total_ms')) as step
where line->>'message' = 'pipeline_latency'
group by 1, 2 order by 1, 2;""",
        "`queue_ms` under 100 at the 95th percentile, else there are too few workers; "
        "`planning_ms` under 50 without a model, and as long as its calls with one. "
        "`execution_ms` is what the capabilities take; `paused_ms` is how long people take.",
    ),
)


def records_page(variables: Mapping[str, str]) -> str:
    """Every kind of record; `variables` are those of the settings, by name."""
    parts = [
        "What the log can tell of runs, for those who count in logs. A record is a line of JSON on "
        "stderr, written a moment after its events are durable by the process that wrote them.",
        table(
            ("record", "one for each", "logger", "on with"),
            [
                (
                    f"[`{guide.name}`](#{guide.name})",
                    first_line(guide.shape.__doc__),
                    f"`{guide.logger}`",
                    f"`{variables[guide.setting]}=true`",
                )
                for guide in GUIDES
            ],
        ),
        "Each line has `ts`, `level`, `logger` and `message` besides its fields. Except for lines "
        "about events, `message` is the name of the record. Ids, names, codes, numbers and times "
        "are in them; prompts, answers, inputs, outputs, the objective and the texts of errors "
        "never are. All are off by default.",
        "Records are readings of the journal and change nothing in a run. A run that was taken "
        "over has its records once, from the process that ended it. They are best effort: when "
        "more runs end than lines can be written, the rest is left out and its events are counted "
        "in `flexrun_unlogged_events_total`; a process that is killed takes its last second along.",
        "## Aggregate them",
        "Load the lines into any Postgres:",
        "```bash\n"
        f'psql scratch -c "{TABLE}"\n'
        "grep '^{' flexrun.log | psql scratch -c \"\\copy log_lines from stdin "
        f'{COPY}"\n'
        "```",
        "The healthy values below are where to begin: keep your own from a week that was good.",
    ]
    for guide in GUIDES:
        parts += list(_section(guide, variables[guide.setting]))
    parts += list(_elsewhere())
    return page("Records", "app/domain/record_shapes.py and docs/records.py", parts)


def _section(guide: Guide, variable: str) -> Iterator[str]:
    yield f"## {guide.name}"
    for paragraph in (guide.shape.__doc__ or "").split("\n\n"):
        yield " ".join(paragraph.split())
    yield f"`{variable}=true` turns it on."
    yield fields(guide.shape.model_json_schema())
    yield f"```sql\n{guide.query}\n```"
    yield f"Healthy: {guide.healthy}"


def _elsewhere() -> Iterator[str]:
    yield "## The same elsewhere"
    yield table(
        ("reading", "has"),
        [
            ("[`GET /v1/slm/metrics`](API.md#get-v1slmmetrics)", "every LLM_RESPONSE, with paging"),
            ("`timings` of [`GET /v1/runs/{run_id}`](API.md)", "the latency, also of nodes"),
            ("[`GET /metrics`](METRICS.md)", "counters and histograms of a process"),
            ("[Traces](OPERATIONS.md#traces)", "runs, attempts and calls as spans"),
            ("[The journal](EVENTS.md)", "everything"),
        ],
    )
