"""`document.key_points` and `document.facts`: everything found stands where it is said to stand."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snowballstemmer import stemmer  # type: ignore[import-untyped]

from app.adapters.capabilities.facts import facts_of
from app.adapters.capabilities.key_points import key_points_of
from app.adapters.capabilities.outline import outline_of
from app.adapters.capabilities.pack_documents import DOCUMENTS_PACK
from app.adapters.capabilities.ranking import rank, terms_of
from app.adapters.capabilities.sentences import sentences_of
from tests.capability_samples import run_builtin

ARTICLE = """\
# Release 2.4.0 of the ferry service

The ferry service now keeps every booking in one durable ledger, and the **ledger** is the only
place that a booking is read from. See [the plan](https://ferry.example.org/plan_(v2).html), e.g.
for the dates. Passengers see a booking only after the ledger has written it.

| number | meaning |
|---|---|
| 9999 | a row that is no sentence at all |

```python
print("The ledger is printed in this code block and must not be a point.")
```

## What changes on 3 March 2027

- Every booking gets one number in the ledger, and numbers are never used twice.
- bump deps
- The old booking table is read for the last time on 2027-03-31.

> The harbour office asked the ferry service for a ledger that survives a crash.

Costs fall by 12.5 % to $1,200.50 a month. Write to Anna.Kay@ferry.example.org or to Anna Kay.
Anna Kay leads the work with the Harbour Office. The median is 42 ms for 1,250 bookings.
"""


def outline(text: str, media_type: str | None = None) -> Any:
    return outline_of(text, None, media_type)


async def points_of(text: str) -> list[dict[str, Any]]:
    inputs = {"document": {"text": text}, "outline": outline(text)}
    output = await run_builtin(DOCUMENTS_PACK, "document.key_points", inputs)
    points: list[dict[str, Any]] = output["key_points"]
    return points


async def test_points_are_sentences_of_the_prose() -> None:
    points = await points_of(ARTICLE)
    texts = [point["text"] for point in points]
    assert texts[0].startswith("The ferry service now keeps every booking")
    assert all(text.endswith(".") and len(text.split()) >= 6 for text in texts)
    assert not any("|" in text or "print" in text or "bump" in text for text in texts)
    assert "**" not in "".join(texts)
    assert points[0]["quote"].count("**") == 2
    assert points[0]["score"] == 1.0
    assert [point["score"] for point in points] == sorted(
        (point["score"] for point in points), reverse=True
    )


async def test_points_carry_their_place() -> None:
    for point in await points_of(ARTICLE):
        start = point["offset"]
        assert ARTICLE[start : start + len(point["quote"])] == point["quote"]
        assert ARTICLE.count("\n", 0, start) + 1 == point["line"]
        assert point["section"] == ("s1" if point["line"] < 15 else "s2")


async def test_a_list_of_changes_gives_its_items() -> None:
    points = await points_of("# Changes\n\n- add retries to the client\n- fix the leak in parser\n")
    assert {point["text"] for point in points} == {
        "add retries to the client",
        "fix the leak in parser",
    }


@pytest.mark.parametrize("text", ["word", "# Only a heading", "|a|\n|-|\n|b|", "```\nx\n```", "."])
async def test_tiny_texts_do_no_harm(text: str) -> None:
    assert len(await points_of(text)) <= 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is so, e.g. here. Dr. Who came. No. 5 is alive!", 3),
        ("See `a.b. C` now. Then [x](http://a.b/c.D) ends.", 2),
        ("A B. Smith wrote v1.2 in Jan. 2024. It sold.", 2),
        ("One two three. four five six. Seven.", 3),
        ("\u4f60\u597d\u3002\u518d\u89c1\u3002", 2),
        ("Wait\u2026 What?! Yes.", 3),
    ],
)
def test_cutting(text: str, expected: int) -> None:
    assert len(sentences_of(text, None)) == expected


PIECES = st.lists(
    st.sampled_from(
        [
            *(
                "The *cat* sat on a mat. ",
                "See [it](http://x.y/z). ",
                "`a. B` ",
                "\n",
                "\n\n",
                "- ",
            ),
            *("> ", "  ", "# H\n", "1. ", "```\n", "\r\n", "e.g. ", "\\", "<b>t</b> ", "|a|b|\n"),
            *("&amp; ", "It is 2027-01-02 and 3 MB. ", "A\u0308 ", "\U0001f600 ", "**Foo Bar** "),
            *("\t", "a@b.org "),
        ]
    ),
    max_size=25,
)


@settings(max_examples=300)
@given(PIECES, st.sampled_from([None, "text/plain"]))
def test_every_quote_and_fact_is_a_slice_of_the_text(
    pieces: list[str], media_type: str | None
) -> None:
    text = "".join(pieces)
    sections = outline(text, media_type)["sections"]
    for sentence in sentences_of(text, media_type):
        assert text[sentence.offset : sentence.offset + len(sentence.quote)] == sentence.quote
    found = facts_of(text, sections)
    for fact in found:
        assert text[fact["offset"] : fact["offset"] + len(fact["text"])] == fact["text"]
    assert found == facts_of(text, sections)
    points = key_points_of(text, media_type, sections)
    assert points == key_points_of(text, media_type, sections)


async def test_facts_of_the_article() -> None:
    inputs = {"document": {"text": ARTICLE}, "outline": outline(ARTICLE)}
    output = await run_builtin(DOCUMENTS_PACK, "document.facts", inputs)
    found = {(fact["kind"], fact["value"], fact.get("unit", "")) for fact in output["facts"]}
    assert found == {
        ("version", "2.4.0", ""),
        ("link", "https://ferry.example.org/plan_(v2).html", ""),
        ("date", "2027-03-03", ""),
        ("date", "2027-03-31", ""),
        ("percent", "12.5", "%"),
        ("money", "1200.50", "USD"),
        ("email", "anna.kay@ferry.example.org", ""),
        ("name", "Anna Kay", ""),
        ("name", "Harbour Office", ""),
        ("number", "42", "ms"),
        ("number", "1250", ""),
    }
    counts = {fact["value"]: fact.get("count", 1) for fact in output["facts"]}
    assert counts["Anna Kay"] == 2


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("on 2024-02-30 and 2024-02-29", "date", "2024-02-29"),
        ("on March 5th, 2024 it", "date", "2024-03-05"),
        ("on 5. September 2024 it", "date", "2024-09-05"),
        ("am 05.09.2024 um", "date", "2024-09-05"),
        ("in Sept 2024", "date", "2024-09"),
        ("by Q3 2024", "date", "2024-Q3"),
        ("since 2019 it", "date", "2019"),
        ("v1.2.3-rc1 is out", "version", "1.2.3-rc1"),
        ("costs \u20ac3.5 million", "money", "3.5e6"),
        ("pay 20 USD now", "money", "20"),
        ("(http://a.org/b).", "link", "http://a.org/b"),
        ("takes 1,000,000 rows/s", "number", "1000000"),
    ],
)
def test_normal_forms(text: str, kind: str, value: str) -> None:
    assert [
        (fact["kind"], fact["value"]) for fact in facts_of(text, outline(text)["sections"])
    ] == [(kind, value)]


@pytest.mark.parametrize("text", ["see 3.1 and 12", "at 10.0.0.1", "`42 ms`", "```\n42 ms\n```\n"])
def test_what_is_no_fact(text: str) -> None:
    assert facts_of(text, outline(text)["sections"]) == []


@pytest.mark.parametrize(
    "piece",
    ["`", "a@", "a.", "1,", "[", "](", "<a ", "A ", "> ", "https://a(", "***", "v1.", "\"'", "_"],
)
def test_hostile_texts_take_linear_time(piece: str) -> None:
    # The time-out of the test is the assertion: a quadratic pattern takes minutes on these.
    text = piece * (300_000 // len(piece))
    sections = outline(text)["sections"]
    facts_of(text, sections)
    key_points_of(text, None, sections)


def test_rank_drops_repetitions_and_keeps_the_order_of_ties() -> None:
    texts = [
        "The ledger keeps every booking of the ferry.",
        "The ledger keeps every booking of the ferry.",
        "A storm closed the northern harbour yesterday.",
        "Cats sleep through storms and ledgers alike.",
    ]
    chosen = [ranked.index for ranked in rank(texts, [1.0] * 4, 10)]
    assert 1 not in chosen
    assert len(chosen) == 3
    assert rank(texts, [0.0] * 4, 10) == []


def test_threads_do_not_disturb_each_other() -> None:
    """Sync builtins run in threads side by side, and a stemmer keeps its word in itself."""
    endings = ["ing", "ation", "fulness", "ies", "ously", "izers", "ement", "ally"]
    texts = [
        " ".join(
            f"w{chr(97 + n % 26)}rd{chr(97 + m % 26)}{endings[(n + m) % 8]}" for m in range(200)
        )
        for n in range(48)
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(terms_of, texts))
    finally:
        sys.setswitchinterval(interval)
    assert together == [stemmer("english").stemWords(text.split()) for text in texts]
