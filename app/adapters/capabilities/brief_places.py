"""What models say about a document, held against the document.

A model reads well and counts badly: it copies a sentence without a fault and is wrong about its
line. So lines and offsets are put right by the quotes, and what the document does not say is left
out of results that promise to hold nothing else, as `brief.py` leaves it out of its own.

Everything here gets an output that fits its contract and returns another one that does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from app.adapters.capabilities.brief import Evidence, check_brief, unsupported
from app.adapters.capabilities.text_lines import Lines, Sections
from app.domain.errors import Fault
from app.ports import CallFailed

DROPPED_MAX = 200
_MARKS = " \t#=*_-"


def settle_outline(inputs: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, Any]:
    """`{outline}` whose sections are in order and cover every line of the document once.

    A section begins where its title stands alone on a line, else where the model says; one that
    would not begin behind the section before it is left out.
    """
    outline = output["outline"]
    lines = Lines(inputs["document"]["text"])
    places = _title_lines(lines)
    kept: list[dict[str, Any]] = []
    for section in outline["sections"]:
        before = kept[-1]["start_line"] if kept else 0
        named = places.get(section["title"].strip(_MARKS).casefold(), ())
        start = next((line for line in named if line > before), section["start_line"])
        if before < start <= lines.count:
            kept.append({**section, "start_line": start})
    kept = kept or [{**outline["sections"][0], "start_line": 1}]
    kept[0]["start_line"] = 1
    for section, following in pairwise(kept):
        section["end_line"] = following["start_line"] - 1
    kept[-1]["end_line"] = lines.count
    return {"outline": {**outline, "line_count": lines.count, "sections": _named_once(kept)}}


def _title_lines(lines: Lines) -> dict[str, list[int]]:
    """The lines that hold these words and nothing else but marks of headings."""
    found: dict[str, list[int]] = {}
    for number in range(1, lines.count + 1):
        if words := lines.line(number).strip(_MARKS).casefold():
            found.setdefault(words, []).append(number)
    return found


def _named_once(sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The sections with ids of ours, which no two share; a parent is a section before its child."""
    ids: dict[str, str] = {}
    found = []
    for number, section in enumerate(sections, 1):
        named = {**section, "id": f"s{number}"}
        parent = ids.get(named.pop("parent", ""))
        found.append(named if parent is None else {**named, "parent": parent})
        ids[section["id"]] = named["id"]
    return found


def settle_key_points(inputs: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, Any]:
    """`{key_points}` that the document holds: those whose quote stands in it and says the same."""
    evidence = Evidence(inputs["document"]["text"])
    sections = Sections(inputs["outline"]["sections"])
    points = []
    for point in output["key_points"]:
        offset = evidence.offset_of(point["quote"], point["offset"])
        if offset is not None and not unsupported(point["text"], point["quote"]):
            line = evidence.lines.at(offset)
            section = sections.at(line)["id"]
            points.append({**point, "offset": offset, "line": line, "section": section})
    return {"key_points": points}


def settle_draft(inputs: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, Any]:
    """`{draft_brief}` with the places of its quotes; a quote that is none is for the check."""
    draft = output["draft_brief"]
    evidence = Evidence(inputs["document"]["text"])
    sections = Sections(inputs["outline"]["sections"])
    bullets = []
    for bullet in draft["bullets"]:
        offset = evidence.offset_of(bullet["quote"], bullet["offset"])
        if offset is None:
            bullets.append(bullet)
            continue
        line = evidence.lines.at(offset)
        section = sections.at(line)
        place = {"offset": offset, "line": line}
        named = {"section": section["title"], "section_id": section["id"]}
        bullets.append({**bullet, **place, **named})
    return {"draft_brief": {**draft, "bullets": bullets}}


def settle_check(inputs: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, Any]:
    """`{brief, brief_report}` that keep what the facet `brief` promises, whoever checked.

    The report names what the model left out by its place in the draft, and what was left out of the
    model's brief by its place there, under `/brief`. Raises CallFailed `brief_ungrounded`, not
    retryable, when nothing is left of a draft that had bullets.
    """
    checked = check_brief(inputs["document"], output["brief"])
    ours = [{**drop, "pointer": "/brief" + drop["pointer"]} for drop in checked.dropped]
    dropped = [*output["brief_report"]["dropped"], *ours][:DROPPED_MAX]
    drafted = len(inputs["draft_brief"]["bullets"])
    if drafted and not checked.brief["bullets"]:
        raise CallFailed(
            "brief_ungrounded",
            "the document supports no bullet of the draft",
            retryable=False,
            # Without the words, unlike those of the builtin check: they are a model's answer.
            faults=tuple(
                Fault(drop["reason"], "the document does not say so", drop["pointer"])
                for drop in dropped
            ),
        )
    looked_at = max(drafted, checked.bullets_checked)
    report = {**checked.report, "bullets_checked": looked_at, "dropped": dropped}
    return {"brief": checked.brief, "brief_report": report}
