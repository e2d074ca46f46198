"""The facets that the standard pack speaks of: their JSON Schemas, titles and instructions.

Places in a document are given the same way everywhere: `line` counts from 1, `offset` and `length`
count characters (code points) of `document.text` from 0, `section` is the id of an outline section.
"""

from __future__ import annotations

from typing import Any

from app.domain.facet import Facet

TEXT_CHARS_MAX = 2_000_000
FACT_KINDS = ("date", "version", "money", "percent", "number", "link", "email", "name")

_line = {"type": "integer", "minimum": 1}
_offset = {"type": "integer", "minimum": 0}
_section_id = {"type": "string", "minLength": 1, "maxLength": 40}
_score = {"type": "number", "minimum": 0, "maximum": 1}


def _text(chars_max: int, chars_min: int = 0) -> dict[str, Any]:
    return {"type": "string", "minLength": chars_min, "maxLength": chars_max}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def _array(items: dict[str, Any], items_max: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": items_max}


def _facet(
    name: str,
    title: str,
    description: str,
    schema: dict[str, Any],
    instruction: str,
    direction: str,
) -> Facet:
    return Facet.model_validate(
        {
            "name": name,
            "title": title,
            "description": description,
            "schema": schema,
            "semantics": {"instruction": instruction},
            "metadata": {
                "version": "1.0.0",
                "direction": direction,
                "owner": "flexrun",
                "tags": ["standard"],
            },
        }
    )


DOCUMENT_SCHEMA = _object(
    {"text": _text(TEXT_CHARS_MAX, 1)},
    {
        "title": _text(500),
        "media_type": {
            "type": "string",
            "pattern": "^[a-z0-9][a-z0-9.+-]*/[a-z0-9][a-z0-9.+-]*$",
            "maxLength": 100,
        },
        "source": _text(4_000),
    },
)

OUTLINE_SCHEMA = _object(
    {
        "title": _text(500),
        "line_count": _line,
        "sections": {
            **_array(
                _object(
                    {
                        "id": _section_id,
                        "title": _text(500),
                        "level": {"type": "integer", "minimum": 0, "maximum": 6},
                        "start_line": _line,
                        "end_line": _line,
                    },
                    {"parent": _section_id},
                ),
                20_000,
            ),
            "minItems": 1,
        },
    }
)

KEY_POINTS_SCHEMA = _array(
    _object(
        {
            "text": _text(2_000, 1),
            "quote": _text(4_000, 1),
            "section": _section_id,
            "line": _line,
            "offset": _offset,
            "score": _score,
        }
    ),
    100,
)

FACTS_SCHEMA = _array(
    _object(
        {
            "kind": {"enum": list(FACT_KINDS)},
            "text": _text(2_000, 1),
            "value": _text(2_000, 1),
            "section": _section_id,
            "line": _line,
            "offset": _offset,
        },
        {"unit": _text(40, 1), "count": {"type": "integer", "minimum": 1}},
    ),
    500,
)

_bullet = {
    "text": _text(2_000, 1),
    "section": _text(500),
    "section_id": _section_id,
    "line": _line,
    "offset": _offset,
    "quote": _text(4_000, 1),
}
_brief_facts = _array(
    _object(
        {
            "kind": {"enum": list(FACT_KINDS)},
            "text": _text(2_000, 1),
            "value": _text(2_000, 1),
            "section_id": _section_id,
            "line": _line,
        }
    ),
    50,
)

DRAFT_BRIEF_SCHEMA = _object(
    {
        "title": _text(500),
        "summary": _text(4_000),
        "bullets": _array(_object(_bullet), 50),
        "facts": _brief_facts,
    }
)

BRIEF_SCHEMA = _object(
    {
        "title": _text(500),
        "summary": _text(4_000),
        "bullets": _array(_object({**_bullet, "grounded": {"const": True}}), 50),
        "facts": _brief_facts,
    }
)

BRIEF_REPORT_SCHEMA = _object(
    {
        "bullets_checked": {"type": "integer", "minimum": 0},
        "bullets_grounded": {"type": "integer", "minimum": 0},
        "dropped": _array(
            _object(
                {
                    "pointer": _text(200),
                    "text": _text(4_000),
                    "reason": {
                        "enum": [
                            "quote_not_found",
                            "number_not_in_quote",
                            "words_not_in_quote",
                            "sentence_not_found",
                            "fact_not_found",
                        ]
                    },
                }
            ),
            200,
        ),
    }
)

STANDARD_FACETS: tuple[Facet, ...] = (
    _facet(
        "url",
        "URL",
        "The address of a document on the web.",
        {"type": "string", "format": "uri", "pattern": "^https?://", "maxLength": 4_000},
        "Give the full http or https address of the page to read.",
        "bidirectional",
    ),
    _facet(
        "document",
        "Document",
        "A text with its title. Markdown unless `media_type` says otherwise.",
        DOCUMENT_SCHEMA,
        "Give the whole text unchanged; its lines and offsets are what later results point at.",
        "bidirectional",
    ),
    _facet(
        "outline",
        "Outline",
        "The sections of a document in order. Together they cover every line exactly once.",
        OUTLINE_SCHEMA,
        "List every section with its heading, level and first and last line.",
        "bidirectional",
    ),
    _facet(
        "key_points",
        "Key points",
        "The sentences that carry a document, best first; `quote` is the text at `offset`.",
        KEY_POINTS_SCHEMA,
        "Quote the sentences that say most about the whole document; do not rephrase them.",
        "bidirectional",
    ),
    _facet(
        "facts",
        "Facts",
        "Dates, versions, amounts, links and names in a document, each with its place.",
        FACTS_SCHEMA,
        "List what can be looked up word for word; `value` is the normal form of `text`.",
        "bidirectional",
    ),
    _facet(
        "draft_brief",
        "Draft brief",
        "A brief that nobody has compared with its document yet.",
        DRAFT_BRIEF_SCHEMA,
        "Write a title, a short summary and a few bullets, each with the quote that supports it.",
        "bidirectional",
    ),
    _facet(
        "brief",
        "Brief",
        "A short account of a document in which every bullet was found in the document.",
        BRIEF_SCHEMA,
        "Keep only what the document says; every bullet carries its quote and its section.",
        "bidirectional",
    ),
    _facet(
        "brief_report",
        "Brief report",
        "What the check of a brief looked at and what it left out, with the reasons.",
        BRIEF_REPORT_SCHEMA,
        "Say for every dropped part why it is not supported by the document.",
        "output",
    ),
    _facet(
        "query",
        "Query",
        "A JMESPath expression.",
        _text(1_000, 1),
        "Write a JMESPath expression; `@` is the whole value.",
        "input",
    ),
    _facet(
        "json_value",
        "JSON value",
        "Any JSON value.",
        {},
        "Give the value to be queried as it is.",
        "bidirectional",
    ),
    _facet(
        "json_result",
        "Query result",
        "What a query found: any JSON value, null when it matched nothing.",
        {},
        "Give exactly what the expression selects.",
        "bidirectional",
    ),
)


def facets_named(*names: str) -> list[Facet]:
    """The standard facets of these names, in this order; raises KeyError for any other name."""
    by_name = {facet.name: facet for facet in STANDARD_FACETS}
    return [by_name[name] for name in names]
