"""The events of a run: as a stream with replay, or as JSON pages."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

import orjson
from fastapi import APIRouter, Query, Request, Response
from pydantic import StringConstraints

from app.api.deps import services_of, tenant_of
from app.api.errors import PROBLEMS
from app.api.negotiate import NO_NUL, accepts_stream
from app.api.run_schemas import EventPage
from app.api.stream import open_stream
from app.bootstrap import Services
from app.domain.errors import BadInput, NotFound
from app.domain.events import EventType, Level
from app.domain.run import TERMINAL
from app.journal.feed import Filter
from app.kit.ids import parse_id
from app.store.events import HeadView

router = APIRouter(tags=["events"])

_FRAME: dict[str, Any] = {
    "anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in ("Event", "DeltaFrame")]
}
_SEQ: dict[str, Any] = {"pattern": "^[0-9]{1,9}$"}  # documented here, judged by `_cursor`

_TYPES = (
    "Only these types. Deltas, which a page never has, are sent without this filter or where it "
    "names `delta`; for the filter of levels they are INFO."
)

NodeFilter = Annotated[str, StringConstraints(max_length=200, pattern=NO_NUL)]


@router.get(
    "/v1/runs/{run_id}/events",
    summary="The events of a run: an SSE stream with replay, or a page",
    response_model=EventPage,
    responses={
        200: {
            "description": (
                "A page, or the stream when `Accept` asks for `text/event-stream`. The `data:` of "
                "its frames is an `Event`; of the frames without an `id` that of `event: delta` is "
                "a `DeltaFrame`, and that of `event: gap` has `from` and `to`."
            ),
            "content": {"text/event-stream": {"schema": _FRAME}},
        },
        204: {"description": "The run is finished and nothing is left behind the cursor."},
        **PROBLEMS(400, 404, 422, 503),
    },
    openapi_extra={
        "parameters": [
            {
                "name": "Last-Event-ID",
                "in": "header",
                "schema": {"type": "string", **_SEQ},
                "description": "Seq of the last event seen; wins over `after`.",
            }
        ]
    },
)
async def get_events(
    request: Request,
    run_id: str,
    after: Annotated[str | None, Query(json_schema_extra=_SEQ)] = None,
    type: Annotated[list[EventType | Literal["delta"]] | None, Query(description=_TYPES)] = None,
    node: Annotated[list[NodeFilter] | None, Query(max_length=200)] = None,
    level: Annotated[list[Level] | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 200,
) -> Response:
    services = services_of(request)
    parsed = parse_id(run_id)
    head = None
    if parsed is not None:
        head = await services.reader.head(tenant_of(request), parsed)
    if parsed is None or head is None:
        raise NotFound("There is no such run.", code="run_not_found")
    cursor = _cursor(request.headers.get("last-event-id"), after, head)
    wanted = Filter(frozenset(type or ()), frozenset(node or ()), frozenset(level or ()))
    if not accepts_stream(request.headers.get("accept", "")):
        return await _page(services, parsed, cursor, limit, wanted)
    if head.status in TERMINAL and cursor >= head.seq:
        return Response(status_code=204)
    return open_stream(services, parsed, cursor, wanted)


def _cursor(last_event_id: str | None, after: str | None, head: HeadView) -> int:
    """Where the client stands. Raises `BadInput` when it is no seq, or one of the future."""
    given = last_event_id if last_event_id is not None else after
    if given is None:
        return 0
    if not given.isascii() or not given.isdigit() or len(given) > 9:
        raise BadInput("The cursor must be the seq of an event.", code="bad_cursor")
    cursor = int(given)
    if cursor > head.seq:
        raise BadInput(
            f"The cursor {cursor} is in the future: the run is at seq {head.seq}.",
            code="cursor_in_future",
        )
    return cursor


async def _page(
    services: Services, run_id: UUID, cursor: int, limit: int, wanted: Filter
) -> Response:
    """Stored bodies are joined as they are: nothing is parsed and encoded again."""
    rows = await services.reader.page(
        run_id, cursor, limit, types=wanted.types, nodes=wanted.nodes, levels=wanted.levels
    )
    next_after = rows[-1].seq if rows else cursor
    fragments = [orjson.Fragment(row.body) for row in rows]
    content = orjson.dumps({"events": fragments, "next_after": next_after})
    return Response(content, media_type="application/json")
