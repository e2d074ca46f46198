"""Builtins that read a document and make a brief of it.

`document.outline`, then `document.key_points` and `document.facts` side by side (both need only the
outline), then `brief.compose` and `brief.check`. The draft is a facet of its own, so whoever asks
for a `brief` gets a checked one: no plan can leave the check out.
"""

from __future__ import annotations

from typing import Any

from app.adapters.capabilities.brief import check_brief, compose_brief
from app.adapters.capabilities.builtin import Pack
from app.adapters.capabilities.facts import facts_of
from app.adapters.capabilities.key_points import key_points_of
from app.adapters.capabilities.outline import outline_of
from app.adapters.capabilities.pack_facets import facets_named
from app.domain.capability import Effect, NodeKind
from app.domain.errors import Fault
from app.ports import Call, CallFailed

DOCUMENTS_PACK = Pack(
    "documents",
    facets_named(
        "document", "outline", "key_points", "facts", "draft_brief", "brief", "brief_report"
    ),
)


@DOCUMENTS_PACK.capability(
    capability_id="document.outline",
    version="1.0.0",
    display_name="Document outline",
    summary="Finds the title and the sections of a Markdown or plain text, with their lines.",
    inputs=["document"],
    outputs=["outline"],
    effect=Effect.PURE,
    node_kind=NodeKind.STRUCTURING,
)
def document_outline(call: Call) -> dict[str, Any]:
    """`{document}` -> `{outline}`; see `outline_of`."""
    document = call.inputs["document"]
    outline = outline_of(document["text"], document.get("title"), document.get("media_type"))
    return {"outline": outline}


@DOCUMENTS_PACK.capability(
    capability_id="document.key_points",
    version="1.0.0",
    display_name="Key points",
    summary="Quotes the sentences that carry a document, best first, without a model.",
    inputs=["document", "outline"],
    outputs=["key_points"],
    effect=Effect.PURE,
)
def document_key_points(call: Call) -> dict[str, Any]:
    """`{document, outline}` -> `{key_points}`; see `key_points_of`."""
    document, outline = call.inputs["document"], call.inputs["outline"]
    points = key_points_of(document["text"], document.get("media_type"), outline["sections"])
    return {"key_points": points}


@DOCUMENTS_PACK.capability(
    capability_id="document.facts",
    version="1.0.0",
    display_name="Facts",
    summary="Lists dates, versions, amounts, links and names of a document with their places.",
    inputs=["document", "outline"],
    outputs=["facts"],
    effect=Effect.PURE,
)
def document_facts(call: Call) -> dict[str, Any]:
    """`{document, outline}` -> `{facts}`; see `facts_of`."""
    document, outline = call.inputs["document"], call.inputs["outline"]
    return {"facts": facts_of(document["text"], outline["sections"])}


@DOCUMENTS_PACK.capability(
    capability_id="brief.compose",
    version="1.0.0",
    display_name="Compose a brief",
    summary="Drafts a short brief from the outline, key points and facts of a document.",
    inputs=["document", "outline", "key_points", "facts"],
    outputs=["draft_brief"],
    effect=Effect.PURE,
    node_kind=NodeKind.TRANSFORMATION,
)
def brief_compose(call: Call) -> dict[str, Any]:
    """`{document, outline, key_points, facts}` -> `{draft_brief}`; see `compose_brief`."""
    given = call.inputs
    draft = compose_brief(given["document"], given["outline"], given["key_points"], given["facts"])
    return {"draft_brief": draft}


@DOCUMENTS_PACK.capability(
    capability_id="brief.check",
    version="1.0.0",
    display_name="Check a brief",
    summary="Compares a drafted brief with its document and keeps only what the document says.",
    inputs=["document", "draft_brief"],
    outputs=["brief", "brief_report"],
    effect=Effect.PURE,
    node_kind=NodeKind.VALIDATION,
)
def brief_check(call: Call) -> dict[str, Any]:
    """`{document, draft_brief}` -> `{brief, brief_report}`; see `check_brief`.

    Raises CallFailed `brief_ungrounded`, not retryable, when the document supports none of
    the draft's bullets.
    """
    checked = check_brief(call.inputs["document"], call.inputs["draft_brief"])
    if checked.bullets_checked and not checked.brief["bullets"]:
        raise CallFailed(
            "brief_ungrounded",
            "the document supports no bullet of the draft",
            retryable=False,
            faults=tuple(
                Fault(drop["reason"], drop["text"][:200], "/draft_brief" + drop["pointer"])
                for drop in checked.dropped
            ),
        )
    return {"brief": checked.brief, "brief_report": checked.report}
