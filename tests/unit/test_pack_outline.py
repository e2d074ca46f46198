"""`document.outline`: sections cover every line once, and only headings make them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.adapters.capabilities.outline import outline_of
from app.adapters.capabilities.pack_documents import DOCUMENTS_PACK
from app.adapters.capabilities.text_lines import Lines
from tests.capability_samples import run_builtin

MARKDOWN = """\
Some words before.

# Guide to *things*

Intro.

```sh
# not a heading
```

## First [part](https://example.org)

Setext part
-----------

> ## quoted, not a section

- # in a list, not a section

    # code, not a heading

#### Deep

# Last
"""


def titles(outline: dict[str, Any]) -> list[tuple[int, str]]:
    return [(section["level"], section["title"]) for section in outline["sections"]]


async def test_markdown_sections() -> None:
    output = await run_builtin(DOCUMENTS_PACK, "document.outline", {"document": {"text": MARKDOWN}})
    assert titles(output["outline"]) == [
        (0, "Guide to things"),
        (1, "Guide to things"),
        (2, "First part"),
        (2, "Setext part"),
        (4, "Deep"),
        (1, "Last"),
    ]
    assert [section.get("parent") for section in output["outline"]["sections"]] == [
        None,
        None,
        "s2",
        "s2",
        "s4",
        None,
    ]
    assert output["outline"]["title"] == "Guide to things"


PLAIN = """\
RELEASE NOTES

The first paragraph says something. It is not a heading.

1. Installation

Run the thing.
1. Not a heading, since a line stands right above it.

1.2 Requirements

    SHELL BLOCK

```
FENCED BLOCK

```

Known Problems
==============

None at all

of these lines end here.
"""


def test_plain_text_sections() -> None:
    outline = outline_of(PLAIN, None, "text/plain")
    assert titles(outline) == [
        (1, "RELEASE NOTES"),
        (1, "1. Installation"),
        (2, "1.2 Requirements"),
        (1, "Known Problems"),
    ]


def test_a_text_of_no_media_type_without_markdown_headings_is_plain() -> None:
    text = PLAIN.replace("=", "")
    assert titles(outline_of(text, None, None))[0] == (1, "RELEASE NOTES")


@pytest.mark.parametrize(
    ("text", "title", "media_type", "expected"),
    [
        ("---\ntitle: 'From the front'\n---\n# Head\n", None, None, "From the front"),
        ("# Head\n", "Given", None, "Given"),
        ("just a line\nand more\n", None, None, "just a line"),
        ('{"a": 1}', None, "application/json", '{"a": 1}'),
        ("\n\n", None, None, "Untitled"),
    ],
)
def test_title(text: str, title: str | None, media_type: str | None, expected: str) -> None:
    assert outline_of(text, title, media_type)["title"] == expected


def test_front_matter_makes_no_heading() -> None:
    outline = outline_of("---\ntitle: x\nother: y\n---\n\n# Head\n", None, None)
    assert [found for found in titles(outline) if found[0]] == [(1, "Head")]


LINES = st.lists(
    st.sampled_from(
        [
            *(
                "# A",
                "## B b",
                "text.",
                "",
                "```",
                "~~~",
                "- item",
                "> quote",
                "===",
                "---",
                "CAPS",
            ),
            *(
                "    code",
                "\t# tab",
                "1. one",
                "| a | b |",
                "|-|-|",
                "<div>",
                "\f",
                "\x0b",
                "\u2028x",
            ),
        ]
    ),
    max_size=30,
)


@given(
    LINES,
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from([None, "text/markdown", "text/plain", "application/json"]),
)
def test_sections_cover_every_line_once(
    lines: list[str], newline: str, media_type: str | None
) -> None:
    text = newline.join(lines)
    outline = outline_of(text, None, media_type)
    expected = 1
    for section in outline["sections"]:
        assert section["start_line"] == expected
        assert section["end_line"] >= section["start_line"]
        expected = section["end_line"] + 1
    assert expected == outline["line_count"] + 1 == Lines(text).count + 1
    assert len({section["id"] for section in outline["sections"]}) == len(outline["sections"])
    assert outline == outline_of(text, None, media_type)


@given(st.text(alphabet="a\n\r", max_size=40))
def test_lines_know_their_places(text: str) -> None:
    lines = Lines(text)
    whole = "".join(text[slice(*lines.span(n, n))] for n in range(1, lines.count + 1))
    assert whole == text
    for offset in range(len(text)):
        start, end = lines.span(lines.at(offset), lines.at(offset))
        assert start <= offset < end
