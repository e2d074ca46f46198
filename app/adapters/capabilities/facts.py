"""Facts of a text: dates, versions, amounts, links, addresses and names, each with its place.

Rules only, no model: what is found stands in the text word for word, and the same text always gives
the same list. Every pattern has bounded repetition, so that no text makes the search slow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from app.adapters.capabilities.ranking import STOPWORDS
from app.adapters.capabilities.text_lines import Lines, Sections

KIND_MAX = {
    "link": 100,
    "email": 50,
    "date": 80,
    "version": 50,
    "money": 50,
    "percent": 50,
    "number": 80,
    "name": 40,
}

_MONTH_NAMES = (
    "january jan|february feb|march mar|april apr|may|june jun|july jul|august aug"
    "|september sept sep|october oct|november nov|december dec"
)
_MONTHS = {
    name: number
    for number, names in enumerate(_MONTH_NAMES.split("|"), start=1)
    for name in names.split()
}
_MONTH = r"(?:" + "|".join(sorted(_MONTHS, key=lambda name: (-len(name), name))) + r")\.?"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_YEAR = r"(?:19|20)\d{2}"
_AMOUNT = r"\d{1,3}(?:,\d{3}){1,5}(?:\.\d{1,6})?(?![\d,])|\d{1,15}(?:\.\d{1,6})?(?!\d)"
_CURRENCY = {"$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY"}
_UNITS = (
    "ns|\u00b5s|us|ms|s|sec|seconds?|min|minutes?|h|hours?|days?|weeks?|months?|years?|KB|MB|GB"
    "|TB|KiB|MiB|GiB|TiB|kB|bytes?|Hz|kHz|MHz|GHz|km|cm|mm|m|kg|g|W|kW|kWh|°C|x|k|M|req/s|runs/s|rows/s"
    "|users?|people|nodes?|events?|commits?|requests?|lines?|files?|tests?|cores?|threads?|workers?"
)


@dataclass(frozen=True, slots=True)
class Found:
    """One match: `value` is its normal form, `unit` a unit or a currency."""

    kind: str
    start: int
    end: int
    value: str
    unit: str = ""


def facts_of(text: str, sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`[{kind, text, value, section, line, offset, unit?, count?}]` in the order of the text.

    `value`: dates as ISO 8601 (year-month or a quarter where no more is said), amounts as plain
    decimals, others as found. The same value of a kind is listed once, at its first place, with
    its `count`. Each kind has its own limit. Always `text[offset : offset + len(fact.text)]` is
    `fact.text`.
    """
    lines, places = Lines(text), Sections(sections)
    seen: dict[tuple[str, str, str], dict[str, Any]] = {}
    listed: dict[str, int] = {}
    for found in sorted(_all(text), key=lambda one: one.start):
        key = (found.kind, found.value, found.unit)
        if key in seen:
            seen[key]["count"] = seen[key].get("count", 1) + 1
            continue
        if listed.get(found.kind, 0) == KIND_MAX[found.kind]:
            continue
        listed[found.kind] = listed.get(found.kind, 0) + 1
        line = lines.at(found.start)
        seen[key] = {
            "kind": found.kind,
            "text": text[found.start : found.end],
            "value": found.value,
            "section": places.at(line)["id"],
            "line": line,
            "offset": found.start,
        }
        if found.unit:
            seen[key]["unit"] = found.unit
    return list(seen.values())


def _all(text: str) -> Iterator[Found]:
    """Every match; what an earlier kind has taken is blanked for the later ones."""
    rest = text
    for pattern, read in _LINKS:
        taken = list(_matches(pattern, read, rest))
        yield from taken
        rest = _blanked(rest, [(one.start, one.end) for one in taken])
    rest = _blanked(rest, [found.span() for found in _CODE.finditer(rest)])
    rows = [found.span() for found in _TABLE_ROW.finditer(rest)]
    for pattern, read in _AMOUNTS:
        taken = list(_matches(pattern, read, rest))
        yield from taken
        rest = _blanked(rest, [(one.start, one.end) for one in taken])
    taken = list(_matches(_NUMBER, _number, _blanked(rest, rows)))
    yield from taken
    yield from _names(_blanked(rest, [found.span() for found in _HEADING.finditer(rest)]))


def _matches(
    pattern: re.Pattern[str], read: Callable[[re.Match[str]], Found | None], text: str
) -> Iterator[Found]:
    for match in pattern.finditer(text):
        found = read(match)
        if found is not None and found.value:
            yield found


def _blanked(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text with these spans as NUL characters, which no pattern accepts; offsets stay."""
    parts: list[str] = []
    last = 0
    for start, end in spans:
        parts += (text[last:start], "\0" * (end - start))
        last = end
    return "".join((*parts, text[last:]))


def _link(match: re.Match[str]) -> Found:
    address = match.group().rstrip(".,;:!?'\"*_")
    return Found("link", match.start(), match.start() + len(address), address)


def _email(match: re.Match[str]) -> Found:
    return Found("email", *match.span(), match.group().lower())


def _date(match: re.Match[str]) -> Found | None:
    parts = match.groupdict()
    month = parts.get("month") or ""
    number = int(month) if month.isdigit() else _MONTHS.get(month.lower().rstrip("."), 0)
    if parts.get("quarter"):
        return Found("date", *match.span(), f"{parts['year']}-Q{parts['quarter']}")
    year = int(parts["year"])
    day = re.sub(r"\D", "", parts.get("day") or "")
    if not day:
        return Found("date", *match.span(), f"{year:04}-{number:02}") if 0 < number < 13 else None
    try:
        return Found("date", *match.span(), date(year, number, int(day)).isoformat())
    except ValueError:
        return None


def _year(match: re.Match[str]) -> Found:
    return Found("date", *match.span(), match.group("year"))


def _version(match: re.Match[str]) -> Found:
    return Found("version", *match.span(), match.group().lstrip("vV"))


def _money(match: re.Match[str]) -> Found:
    mark = match.group("mark") or match.group("code")
    value = _decimal(match.group("amount") or match.group("amount2"))
    scale = (match.group("scale") or "").lower()
    return Found("money", *match.span(), value + _SCALES.get(scale, ""), _CURRENCY.get(mark, mark))


_SCALES = {"k": "e3", "m": "e6", "million": "e6", "bn": "e9", "billion": "e9"}


def _percent(match: re.Match[str]) -> Found:
    return Found("percent", *match.span(), _decimal(match.group("amount")), "%")


def _number(match: re.Match[str]) -> Found | None:
    amount, unit = match.group("amount"), match.group("unit") or ""
    # A bare small or broken number is mostly a list mark, a section or a version.
    if not unit and (len(amount) < 3 or "." in amount or amount.startswith("0")):
        return None
    return Found("number", *match.span(), _decimal(amount), unit)


def _decimal(amount: str) -> str:
    return amount.replace(",", "")


_CODE = re.compile(
    r"^[ ]{0,3}(?P<mark>`{3,}+|~{3,}+)[^\n]*+\n"
    r"(?:(?![ ]{0,3}(?P=mark))[^\n]*+\n)*+(?:[ ]{0,3}(?P=mark))?"
    r"|`[^`\n]{1,400}`",
    re.MULTILINE,
)
_HEADING = re.compile(r"^[ ]{0,3}#{1,6}[ \t][^\n]*", re.MULTILINE)
_TABLE_ROW = re.compile(r"^[ ]{0,3}\|[^\n]*", re.MULTILINE)
_URL_CHAR = r"[^\s<>\"'`\0()\[\]]"
_LINKS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Found | None]], ...] = (
    (re.compile(rf"https?://(?:{_URL_CHAR}|\({_URL_CHAR}{{0,100}}\)){{3,1900}}"), _link),
    (
        re.compile(
            r"(?<![\w.+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}"
            r"@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"
        ),
        _email,
    ),
)
_AMOUNTS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Found | None]], ...] = (
    (
        re.compile(
            rf"(?<![\d.-])(?P<year>{_YEAR})([-/])(?P<month>\d{{2}})\2(?P<day>\d{{2}})(?![\d-])"
        ),
        _date,
    ),
    (re.compile(rf"(?<![\d.-])(?P<year>{_YEAR})-(?P<month>\d{{2}})(?![\d-])"), _date),
    (
        re.compile(
            rf"\b(?P<day>{_DAY})\.?[ ](?:of[ ])?(?P<month>{_MONTH})[ ,]{{1,2}}(?P<year>{_YEAR})\b",
            re.IGNORECASE,
        ),
        _date,
    ),
    (
        re.compile(
            rf"\b(?P<month>{_MONTH})[ ](?P<day>{_DAY}),?[ ](?P<year>{_YEAR})\b", re.IGNORECASE
        ),
        _date,
    ),
    (
        re.compile(
            rf"(?<![\d.])(?P<day>\d{{1,2}})\.(?P<month>\d{{1,2}})\.(?P<year>{_YEAR})(?![\d.]\d)"
        ),
        _date,
    ),
    (re.compile(rf"\b(?P<month>{_MONTH})[ ](?P<year>{_YEAR})\b", re.IGNORECASE), _date),
    (
        re.compile(rf"(?:(?<=\bin )|(?<=\bsince )|(?<=\buntil ))(?P<year>{_YEAR})\b(?![\d.-])"),
        _year,
    ),
    (re.compile(rf"\bQ(?P<quarter>[1-4])[ /-](?P<year>{_YEAR})\b"), _date),
    (
        re.compile(
            r"(?<![\w.])(?:[vV]\d{1,5}(?:\.\d{1,5}){1,3}|\d{1,5}\.\d{1,5}\.\d{1,5})"
            r"(?:-?(?:alpha|beta|rc|dev|post|a|b)\.?\d{0,4})?(?![\w.]?\d)\b"
        ),
        _version,
    ),
    (
        re.compile(
            rf"(?P<mark>[$€£¥])[ ]?(?P<amount>{_AMOUNT})"
            r"[ ]?(?P<scale>(?:k|m|bn|million|billion)\b)?"
            rf"|(?<![\w.,])(?P<amount2>{_AMOUNT})[ ](?P<code>USD|EUR|GBP|CHF|JPY)\b",
            re.IGNORECASE,
        ),
        _money,
    ),
    (re.compile(rf"(?<![\w.,])(?P<amount>{_AMOUNT})[ ]?(?:%|percent\b|per cent\b)"), _percent),
)
# In a table a bare number means nothing without its row and column, so rows are left out.
_NUMBER = re.compile(
    rf"(?<![\w.,:/#§-])(?P<amount>{_AMOUNT})(?![:/\-]\d)(?:[ ]?(?P<unit>{_UNITS})(?![\w/]))?(?!\w)"
)

_WORD = r"[A-Z][A-Za-z0-9\u00c0-\u024f'\u2019]{1,30}(?:-[A-Za-z][A-Za-z0-9]{1,20}){0,2}"
_NAME = re.compile(rf"\b{_WORD}(?:[ ](?:(?:of|de|der|van|von|di|la)[ ])?{_WORD}){{0,3}}")
_UNIT_WORDS = frozenset(_UNITS.split("|"))
_MARK = re.compile(r"[A-Z]{1,2}\d{1,4}")
_POSSESSIVE = re.compile(r"['\u2019]s?$")
_STARTS = re.compile(r"(?:^|[.!?:;|\u2022]|[-*+#>]|\d[.)])[ \t\"'\u201c\u2018(\[*_]*$")


def _is_no_name(word: str, small: frozenset[str]) -> bool:
    return word.lower() in STOPWORDS or word.lower() in small or bool(_MARK.fullmatch(word))


def _names(text: str) -> Iterator[Found]:
    """Runs of capitalised words, and single ones that are no ordinary words.

    A word alone is a name when it has a capital inside (PostgreSQL, FastAPI), or when it stands
    capitalised in the middle of a sentence at least twice and is never written small.
    """
    small = frozenset(re.findall(r"\b[a-z][a-z'\u2019-]+\b", text))
    alone: dict[str, list[Found]] = {}
    for match in _NAME.finditer(text):
        start, words = match.start(), match.group().split(" ")
        opens = bool(_STARTS.search(text[max(text.rfind("\n", 0, start) + 1, start - 40) : start]))
        while words and _is_no_name(words[0], small if opens else frozenset()):
            start += len(words.pop(0)) + 1
            opens = False
        if not words or text[match.end() : match.end() + 1] == "_":
            continue
        value = _POSSESSIVE.sub("", " ".join(words))
        found = Found("name", start, start + len(value), value)
        if len(words) > 1 and not value.isupper():
            yield found
        elif len(words) == 1 and not value.isupper():
            if re.search(r"[a-z][A-Z]", value) and value not in _UNIT_WORDS:
                yield found
            elif not opens and value.lower() not in small and len(value) > 2:
                alone.setdefault(value, []).append(found)
    for places in alone.values():
        if len(places) > 1:
            yield from places
