"""The documents say what the code does: generated pages, diagrams, numbers, paths, links, names."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import pytest
import typer.main

from app.api.stream import HEARTBEAT_S, SEND_TIMEOUT_S
from app.cli.main import _with_default
from app.cli.main import app as cli
from app.domain.capability import Registration
from app.domain.envelope import Envelope
from app.domain.events import EventType
from app.domain.run import NODE_TRANSITIONS, RUN_TRANSITIONS, TERMINAL, NodeStatus, RunStatus
from app.journal.feed import POLL_S, RING_FRAMES_MAX
from app.orchestrator.lease import FENCE_S, RENEW_EVERY_S
from app.orchestrator.loop import SNAPSHOT_EVENTS_MIN
from app.orchestrator.outcomes import INLINE_VALUE_BYTES_MAX
from app.settings import Settings
from app.store.leases import LEASE_S
from app.store.partitions import DAYS_AHEAD
from app.worker import SECOND_LOOK_S
from docs.generate import DOCS, METHODS, ROOT, pages, variable_of
from docs.problem_codes import fault_codes, problem_codes

README = ROOT / "README.md"
ARCHITECTURE = DOCS / "ARCHITECTURE.md"
_BY_HAND = ("ARCHITECTURE", "DEPLOYMENT", "GLOSSARY", "METRICS", "OPERATIONS", "RELIABILITY")
WRITTEN_BY_HAND = [README, *(DOCS / f"{n}.md" for n in _BY_HAND)]
ALL = sorted({*WRITTEN_BY_HAND, *DOCS.glob("*.md")})
EXAMPLES = sorted((ROOT / "examples").iterdir())


def name_of(path: Path) -> str:
    return path.name


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def bash_blocks(path: Path) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", text_of(path), re.DOTALL)


# --- generated pages ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["EVENTS.md", "API.md", "RECORDS.md", "SETTINGS.md"])
def test_a_generated_page_is_what_the_code_says_now(name: str) -> None:
    assert text_of(DOCS / name) == pages()[name], "write it anew: python -m docs.generate"


def test_every_event_type_is_documented() -> None:
    page = pages()["EVENTS.md"]

    assert [event for event in EventType if f"\n### {event}\n" not in page] == []


def test_problem_codes_are_found_in_the_source() -> None:
    found = {(status, code) for status, code, _ in problem_codes()}

    assert found >= {
        ("400", "`cursor_in_future`"),
        ("404", "`run_not_found`"),
        ("409", "`stale_plan_version`"),
        ("413", "`body_too_large`"),
        ("422", "`plan_rejected`"),
        ("503", "`submit_outcome_unknown`"),
    }


def test_fault_codes_are_found_in_the_source() -> None:
    assert {"CYCLE", "PROOF_TOO_WEAK", "JSON_NUL", "UNKNOWN_FACET"} <= set(fault_codes())


def test_every_route_has_a_heading() -> None:
    headings = re.findall(r"^### ([A-Z]+) /", pages()["API.md"], re.MULTILINE)

    assert headings
    assert {heading.lower() for heading in headings} <= set(METHODS)


# --- diagrams -------------------------------------------------------------------------------------


def diagram(name: str) -> list[tuple[str, str, str]]:
    """The `(from, to, label)` arrows of a state diagram."""
    block = re.search(
        rf"<!-- states: {name} -->\n```mermaid\nstateDiagram-v2\n(.*?)```",
        text_of(ARCHITECTURE),
        re.DOTALL,
    )
    assert block is not None
    arrows = []
    for line in block[1].splitlines():
        match = re.fullmatch(r" {4}(\S+) --> ([^\s:]+)(?:: (.+))?", line)
        assert match is not None, line
        arrows.append((match[1], match[2], match[3] or ""))
    return arrows


@pytest.mark.parametrize(
    ("name", "table", "first", "last"),
    [
        ("run", RUN_TRANSITIONS, RunStatus.QUEUED, TERMINAL),
        (
            "node",
            NODE_TRANSITIONS,
            NodeStatus.PENDING,
            {status for status, after in NODE_TRANSITIONS.items() if not after},
        ),
    ],
)
def test_a_diagram_shows_the_transition_table(
    name: str,
    table: Mapping[str, frozenset[str]],
    first: str,
    last: Set[str],
) -> None:
    arrows = {(source, target) for source, target, _ in diagram(name)}
    expected = {(str(source), str(to)) for source, after in table.items() for to in after}

    assert arrows == (expected | {("[*]", str(first))} | {(str(status), "[*]") for status in last})


@pytest.mark.parametrize("name", ["run", "node"])
def test_the_labels_of_a_diagram_are_event_types(name: str) -> None:
    named = {label for _, _, label in diagram(name) if re.fullmatch("[A-Z_]+", label)}

    assert named
    assert named <= set(EventType)


# --- words and numbers ----------------------------------------------------------------------------


def quotes(path: Path) -> list[str]:
    """The block quotes of a page, each as one line."""
    found = re.findall(r"(?:^> .*\n)+", text_of(path), re.MULTILINE)
    return [" ".join(re.sub(r"^> ", "", quote, flags=re.MULTILINE).split()) for quote in found]


def test_the_promise_is_the_same_everywhere() -> None:
    [promise] = [quote for quote in quotes(README) if quote.startswith("Accepted runs")]

    assert promise in quotes(ARCHITECTURE)
    assert promise == (
        "Accepted runs are never lost. A node attempt may be executed more than once, but its "
        "result is recorded at most once. The events of a run are numbered 1, 2, 3 … without gaps, "
        "never change, and are visible only after they are durable. A side effect can happen twice "
        "only where its capability is declared `idempotent`; for an `at_most_once` capability an "
        "unknown outcome becomes `NODE_BLOCKED`, never a silent retry."
    )


@pytest.mark.parametrize(
    "phrase",
    [
        f"renewed every {RENEW_EVERY_S:g} s, valid for {LEASE_S:g} s",
        f"counts {FENCE_S:g} s of its own monotonic clock",
        f"in two looks, {SECOND_LOOK_S * 1000:.0f} ms apart",
        f"a ring of its newest {RING_FRAMES_MAX:,} frames",
        f"in one query every {POLL_S * 1000:.0f} ms",
        f"A client that reads nothing for {SEND_TIMEOUT_S:.0f} s",
        f"Values over {INLINE_VALUE_BYTES_MAX // 1024} KiB",
        f"max({SNAPSHOT_EVENTS_MIN}, nodes of the plan)",
        f"They are, for {DAYS_AHEAD} days",
    ],
)
def test_the_numbers_are_those_of_the_code(phrase: str) -> None:
    assert phrase in " ".join(text_of(ARCHITECTURE).split())


def test_heartbeats_are_more_frequent_than_the_usual_time_out_of_a_proxy() -> None:
    assert HEARTBEAT_S <= 30


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_variable_is_a_setting(path: Path) -> None:
    known = {variable_of(name, field) for name, field in Settings.model_fields.items()}
    known.add("FLEXRUN_URL")  # of the command line alone
    named = set(re.findall(r"\bFLEXRUN_[A-Z_]+\b|\b[A-Z]+_URL\b", text_of(path)))

    assert named <= known


def test_settings_without_an_effect_are_named() -> None:
    sources = [p.read_text() for p in (ROOT / "app").rglob("*.py") if p.name != "settings.py"]
    used = set(re.findall(r"\bsettings\.(\w+)", "\n".join(sources)))
    idle = {variable_of(n, field) for n, field in Settings.model_fields.items() if n not in used}
    said = re.search(
        r"^- The settings (.*) are read, but have no effect yet", text_of(README), re.M
    )

    assert idle == (set(re.findall(r"`(\w+)`", said[1])) if said else set())


@pytest.mark.parametrize("path", WRITTEN_BY_HAND, ids=name_of)
def test_every_event_named_exists(path: Path) -> None:
    named = re.findall(r"\b(?:RUN|NODE|PLAN)_[A-Z]+\b(?!_)", text_of(path))

    assert set(named) <= {*EventType, "RUN_TRANSITIONS", "NODE_TRANSITIONS"}


# --- paths and links ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_file_named_exists(path: Path) -> None:
    """A path is named from the root or, in pictures, from app/."""
    words = re.findall(r"(?<![\w/.:-])(?:[\w.-]+/)+(?:[\w.-]+)?", strip_urls(text_of(path)))
    named = {word.rstrip(".") for word in words if is_path(word)}
    places = (ROOT, ROOT / "app", path.parent)

    assert [n for n in sorted(named) if not any((place / n).exists() for place in places)] == []


def is_path(word: str) -> bool:
    """Names a source file or a folder of the repository, not a media type or a route."""
    top = word.split("/")[0]
    has_suffix = re.search(r"\.(py|md|json|toml|ini|yml|yaml)$", word) is not None
    return has_suffix or top in ("app", "docs", "tests", "examples", "migrations")


def strip_urls(text: str) -> str:
    return re.sub(r"https?://\S+|/v1/\S+", "", text)


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_relative_link_resolves(path: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", strip_code(text_of(path))):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)

    assert dead == []


def strip_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", strip_code(text_of(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- commands and examples ------------------------------------------------------------------------


def flexrun_lines() -> list[str]:
    lines = [
        line
        for path in WRITTEN_BY_HAND
        for block in bash_blocks(path)
        for line in block.splitlines()
    ]
    found = [line for line in lines if re.match(r"(\w+=\S+ )*flexrun ", line)]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("line", flexrun_lines())
def test_every_command_line_parses(line: str) -> None:
    words = shlex.split(line, comments=True)
    args = _with_default(words[words.index("flexrun") + 1 :])
    command: Any = typer.main.get_command(cli)
    context = command.context_class(command)
    while hasattr(command, "get_command"):
        command = command.get_command(context, args.pop(0))
        assert command is not None, line
        context = command.context_class(command, parent=context)

    command.make_context(command.name, args)


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    named = {n for path in WRITTEN_BY_HAND for n in re.findall(r"\bmake ([a-z]+)`", text_of(path))}

    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_every_example_is_valid_and_has_a_line_in_the_readme(path: Path) -> None:
    assert f"| [examples/{path.name}](examples/{path.name}) | " in text_of(README)
    if path.suffix == ".json":
        body = json.loads(text_of(path))
        model = Registration if "capability_id" in body else Envelope
        model.model_validate(body)
