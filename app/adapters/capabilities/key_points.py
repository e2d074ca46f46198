"""Key points: the sentences of a document that say most, chosen by form, place and centrality."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from app.adapters.capabilities.ranking import STOPWORDS, rank, terms_of, words_of
from app.adapters.capabilities.sentences import Sentence, sentences_of
from app.adapters.capabilities.text_lines import Sections, word_set

POINTS_MAX = 24
_WORDS_MIN = 6
_WORDS_BEST = (14, 32)
_WORDS_MAX = 55
_CHARS_MAX = 600
_ENOUGH = 4

_CODE = re.compile(r"`[^`]*`")
_LINK = re.compile(r"!?\[([^\[\]]{0,400})\]\([^()\s]{0,2000}\)|https?://\S+")
_ODD_WORD = re.compile(r"\b(?:[A-Z][A-Z0-9_]+|\w*\d\w*|\w+_\w+)\b|#\d+")
_CLOSED = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"'\u201d\u2019)\]]{0,4}$")
_OPENING = re.compile(r"^[\"'\u201c\u2018(\[]{0,3}[A-Z0-9\u00c0-\u024f\u0370-\u04ff\u3040-\u9fff]")
# Openings that lean on the sentence before: they read badly alone.
_LEANING = word_set(
    """also and another anyone anything because both but even everybody everything he hence here how
    however instead it its neither one or otherwise same she similarly so such that then there
    therefore these they this those thus two what whatever when which yet see"""
)


def key_points_of(
    text: str, media_type: str | None, sections: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """`[{text, quote, section, line, offset, score}]`, the best first, at most 24.

    When a document has hardly any full sentences, such as a list of changes, its unfinished ones
    are taken too; a text of a few words gives those words.
    """
    found = Sections(sections)
    sentences = sentences_of(text, media_type)
    forms = [form_of(sentence) for sentence in sentences]
    if sum(form > 0 for form in forms) < _ENOUGH:
        forms = [max(form, fragment_of(one)) for form, one in zip(forms, sentences, strict=True)]
    themes = _themes(sections)
    opening = {one.paragraph: index for index, one in reversed(list(enumerate(sentences)))}
    priors = [
        form
        * place_of(one, found, themes, last_line=sentences[-1].line)
        * (1.1 if opening[one.paragraph] == index else 1.0)
        if form
        else 0.0
        for index, (form, one) in enumerate(zip(forms, sentences, strict=True))
    ]
    return [
        {
            "text": sentences[ranked.index].text,
            "quote": sentences[ranked.index].quote,
            "section": found.at(sentences[ranked.index].line)["id"],
            "line": sentences[ranked.index].line,
            "offset": sentences[ranked.index].offset,
            "score": ranked.score,
        }
        for ranked in rank([sentence.text for sentence in sentences], priors, POINTS_MAX)
    ]


def form_of(sentence: Sentence) -> float:
    """How well the sentence stands alone, 0 (not at all) to 1."""
    shown = sentence.text
    words = words_of(shown)
    if not (_WORDS_MIN <= len(words) <= _WORDS_MAX and len(shown) <= _CHARS_MAX):
        return 0.0
    if not (_CLOSED.search(shown) and _OPENING.match(shown)) or _is_debris(sentence):
        return 0.0
    # Cosine favours short sentences; a brief needs those that say something whole.
    form = min(1.0, math.sqrt(len(words) / _WORDS_BEST[0]))
    if len(words) > _WORDS_BEST[1]:
        form *= 0.75
    if words[0] in _LEANING:
        form *= 0.45
    if shown.endswith("?"):
        form *= 0.4
    if sum(word in STOPWORDS for word in words) < 2:
        form *= 0.4
    form *= 1 - 0.6 * _share(_CODE, sentence.quote)
    if not shown[0].isalpha():
        form *= 0.5
    return form * _flow_of(shown, len(words))


def _flow_of(shown: str, word_count: int) -> float:
    """Less for insertions, for lists in a sentence and for rows of names."""
    breaks = sum(shown.count(mark) for mark in "(;:→=")
    listed = shown.count(",") + shown.count("/")
    flow = 1 - 0.15 * min(breaks, 4)
    if listed * 6 > word_count:
        flow *= 0.6
    if len(_ODD_WORD.findall(shown)) * 5 > word_count:
        flow *= 0.6
    return flow


def fragment_of(sentence: Sentence) -> float:
    """The weight of a sentence that is not closed, as in lists; small, but not nothing."""
    words = words_of(sentence.text)
    if not words or len(sentence.text) > _CHARS_MAX or sentence.text.endswith(":"):
        return 0.0
    if _is_debris(sentence):
        return 0.0
    return 0.5 if len(words) >= 4 else 0.1


def _is_debris(sentence: Sentence) -> bool:
    """Mostly code, links, digits or table cells, or cut in the middle of a bracket."""
    quote = sentence.quote
    if quote.count("|") >= 2 or _share(_CODE, quote) > 0.45 or _share(_LINK, quote) > 0.6:
        return True
    if sentence.text.count("(") != sentence.text.count(")"):
        return True
    letters = sum(char.isalpha() or char.isspace() for char in sentence.text)
    return letters < 0.75 * len(sentence.text)


def _share(pattern: re.Pattern[str], text: str) -> float:
    return sum(len(found.group()) for found in pattern.finditer(text)) / len(text)


def _themes(sections: Sequence[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    return {section["id"]: frozenset(terms_of(section["title"])) for section in sections}


def place_of(
    sentence: Sentence,
    sections: Sections,
    themes: Mapping[str, frozenset[str]],
    *,
    last_line: int,
) -> float:
    """Weight of a place, about 1: early sentences and those that take up their heading count more.

    After H. P. Edmundson, "New Methods in Automatic Extracting", JACM 16 (1969).
    """
    section = sections.at(sentence.line)
    weight = 1.2 - 0.4 * sentence.line / max(last_line, 1)
    if themes[section["id"]] & set(terms_of(sentence.text)):
        weight *= 1.15
    return weight * (0.9 if sentence.in_list else 1.0)
