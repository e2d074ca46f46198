"""`brief.compose` and `brief.check`: a brief holds only what its document says."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from app.adapters.capabilities.brief import check_brief, unsupported
from app.adapters.capabilities.pack_documents import DOCUMENTS_PACK
from app.ports import CallFailed
from tests.capability_samples import run_builtin

DOCUMENT = {
    "text": """\
# The night train

The night train runs between the two capitals from 4 May 2027, and its beds can be booked at once.
It leaves the northern station at nine in the evening. Breakfast is served before the border.

## Prices

A bed costs at least 89 euros, and a whole compartment costs 240 euros for up to four people.
Children under six travel free when they share a bed with an adult.

| class | beds |
|---|---|
| first | 2 |

## Limits

- Bicycles are carried only in the last carriage, which has room for **twelve** of them.
- The train carries no cars, because the tunnel at the border is too low for the wagons.
- Dogs need a compartment of their own, and [the rules](https://train.example.org/dogs) say why.
"""
}


async def draft_of(document: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {"document": document}
    for capability_id in (
        "document.outline",
        "document.key_points",
        "document.facts",
        "brief.compose",
    ):
        registration = next(
            one for one in DOCUMENTS_PACK.registrations() if one.capability_id == capability_id
        )
        wanted = registration.input_contract.facets  # type: ignore[union-attr]
        inputs = {name: state[name] for name in wanted}
        state |= await run_builtin(DOCUMENTS_PACK, capability_id, inputs)
    draft: dict[str, Any] = state["draft_brief"]
    return draft


async def checked(document: dict[str, Any], draft: dict[str, Any]) -> dict[str, Any]:
    inputs = {"document": document, "draft_brief": draft}
    return await run_builtin(DOCUMENTS_PACK, "brief.check", inputs)


async def test_a_composed_brief_is_grounded_whole() -> None:
    draft = await draft_of(DOCUMENT)
    output = await checked(DOCUMENT, draft)
    brief, report = output["brief"], output["brief_report"]
    assert report["dropped"] == []
    assert report["bullets_grounded"] == report["bullets_checked"] == len(brief["bullets"]) >= 4
    assert brief["title"] == "The night train"
    assert brief["summary"].startswith("The night train runs between the two capitals")
    assert all(bullet["grounded"] for bullet in brief["bullets"])
    assert {bullet["section"] for bullet in brief["bullets"]} >= {"Prices", "Limits"}
    assert ("date", "2027-05-04") in {(fact["kind"], fact["value"]) for fact in brief["facts"]}


async def test_the_same_document_gives_the_same_bytes() -> None:
    first, second = [json.dumps(await draft_of(DOCUMENT)) for _ in range(2)]
    assert first == second


async def test_no_bullet_repeats_the_summary() -> None:
    draft = await draft_of(DOCUMENT)
    assert not any(bullet["text"] in draft["summary"] for bullet in draft["bullets"])


def planted(bullet: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(bullet), **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quote": "A bed costs at least 8 euros."}, "quote_not_found"),
        ({"text": "A bed costs at least 98 euros."}, "number_not_in_quote"),
        ({"text": "The railway was sold to a foreign bank."}, "words_not_in_quote"),
        ({"text": "It is what it is."}, "words_not_in_quote"),
    ],
)
async def test_a_planted_bullet_is_dropped(changes: dict[str, Any], reason: str) -> None:
    draft = await draft_of(DOCUMENT)
    real = next(bullet for bullet in draft["bullets"] if "89 euros" in bullet["text"])
    at = random.Random(reason).randrange(len(draft["bullets"]) + 1)
    draft["bullets"].insert(at, planted(real, **changes))
    output = await checked(DOCUMENT, draft)
    assert [(one["pointer"], one["reason"]) for one in output["brief_report"]["dropped"]] == [
        (f"/bullets/{at}", reason)
    ]
    assert output["brief_report"]["bullets_grounded"] == len(draft["bullets"]) - 1


async def test_a_paraphrase_with_its_quote_is_kept() -> None:
    draft = await draft_of(DOCUMENT)
    real = next(bullet for bullet in draft["bullets"] if "89 euros" in bullet["text"])
    draft["bullets"] = [planted(real, text="Beds cost 89 euros, compartments 240 euros.", offset=0)]
    output = await checked(DOCUMENT, draft)
    assert output["brief"]["bullets"][0]["offset"] == real["offset"]


async def test_invented_sentences_and_facts_are_dropped() -> None:
    draft = await draft_of(DOCUMENT)
    draft["summary"] += " The train is the fastest on earth."
    draft["facts"].append(
        {"kind": "number", "text": "777", "value": "777", "section_id": "s1", "line": 3}
    )
    output = await checked(DOCUMENT, draft)
    assert "fastest" not in output["brief"]["summary"]
    assert {one["reason"] for one in output["brief_report"]["dropped"]} == {
        "sentence_not_found",
        "fact_not_found",
    }


async def test_a_draft_without_any_support_fails_the_node() -> None:
    other = "# Other\n\nA quite different text is about the sea and fish."
    draft = await draft_of({"text": other})
    with pytest.raises(CallFailed) as caught:
        await checked(DOCUMENT, draft)
    assert caught.value.code == "brief_ungrounded"
    assert not caught.value.retryable
    assert caught.value.faults[0].code == "quote_not_found"


async def test_the_brief_of_one_word() -> None:
    document = {"text": "Hello"}
    output = await checked(document, await draft_of(document))
    assert output["brief"]["title"] == "Hello"


@pytest.mark.parametrize(
    "text",
    [
        "# T\r\n\r\nThe first line of a text goes on\r\nover the line end, and then it stops.\r\n",
        "> The first line of the quoted text goes on\n> over the line end, and then it stops.\n",
        "- The first line of an item in a list goes\n  on over the line end and then stops.\n",
        "A line with an entity &amp; a <b>tag</b> that the reader never sees in the text.\n",
        "A line that ends hard  \nand goes on with a backslash\\\nbefore it comes to its end.\n",
    ],
)
async def test_markup_between_the_words_is_no_difference(text: str) -> None:
    document = {"text": text}
    output = await checked(document, await draft_of(document))
    assert output["brief_report"]["dropped"] == []
    assert output["brief"]["summary"]
    assert len(output["brief"]["bullets"]) == 1


def test_support() -> None:
    assert unsupported("The bed costs 89 euros.", "A bed costs 89 euros.") == ""
    assert unsupported("", "anything") == "words_not_in_quote"


def test_a_quote_may_differ_in_white_space() -> None:
    draft = {
        "title": "t",
        "summary": "",
        "bullets": [
            {
                "text": "one two three",
                "quote": "one  two\nthree",
                "section": "t",
                "section_id": "s1",
                "line": 9,
                "offset": 99,
            }
        ],
        "facts": [],
    }
    bullet = check_brief({"text": "zero\none two three"}, draft).brief["bullets"][0]
    assert (bullet["offset"], bullet["line"]) == (5, 2)
