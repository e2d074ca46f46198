"""Runs, nodes, events and results as lines for people."""

from __future__ import annotations

import itertools
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from app.cli.output import as_json, console, plain
from app.cli.picture import NodeLook, Picture, laid_out

SYMBOLS = {
    "pending": ("○", "dim"),
    "running": ("●", "yellow"),
    "blocked": ("■", "magenta"),
    "done": ("✓", "green"),
    "failed": ("✗", "red"),
    "skipped": ("-", "dim"),
}
RUN_STYLES = {
    "running": "yellow",
    "done": "green",
    "failed": "red",
    "cancelled": "red",
    "awaiting_human": "magenta",
    "paused": "magenta",
}
BUSY = frozenset({"running", "failed", "blocked"})
GUIDED_DEPTH_MAX = 16
WIDTH_MAX = 100
DETAIL_CHARS_MAX = 160


def duration(ms: float | None) -> str:
    """A time span as people say it."""
    if ms is None:
        return ""
    if ms < 0.1:
        return "<0.1 ms"
    if ms < 1000:
        return f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms"
    seconds = ms / 1000
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def error_text(error: dict[str, Any] | None) -> str:
    """`code: message` of an error inside an event or a resource."""
    return f"{error.get('code', 'error')}: {error.get('message', '')}" if error else ""


def tree_lines(picture: Picture, *, lines_max: int | None = None) -> list[Text]:
    """The nodes of a run, each below what it waits for. What does not fit is only counted."""
    nodes = picture.nodes
    lines = laid_out({name: node.requires for name, node in nodes.items()}, GUIDED_DEPTH_MAX)
    if lines_max is None or len(lines) <= lines_max:
        return [_node_line(line.guide, nodes[line.node_id]) for line in lines]
    busy = [line.node_id for line in lines if nodes[line.node_id].status in BUSY]
    shown = busy[: max(lines_max - 1, 0)]
    counts = Counter(node.status for node in nodes.values())
    summary = "  ".join(f"{SYMBOLS[s][0]} {counts[s]} {s}" for s in SYMBOLS if counts[s])
    return [*(_node_line("", nodes[node_id]) for node_id in shown), Text(summary)]


def _node_line(guide: str, node: NodeLook) -> Text:
    symbol, style = SYMBOLS.get(node.status, ("?", ""))
    line = Text()
    line.append(guide, style="dim")
    line.append(f"{symbol} ", style=style)
    line.append(plain(node.node_id), style="bold")
    line.append(f"  {plain(node.capability_id)}", style="dim")
    if node.status not in ("pending", "done"):
        line.append(f"  {node.status}", style=style)
    if node.attempt > 1:
        line.append(f"  attempt {node.attempt}")
    if took := duration(node.elapsed_ms):
        line.append(f"  {took}")
    if len(node.requires) > 1:
        line.append(f"  ← {plain(', '.join(_shortened(node.requires)))}", style="dim")
    if node.reason:
        line.append(f"  {plain(node.reason)}", style=style)
    if node.error:
        line.append(f"  {plain(_cut(error_text(node.error)))}", style="red")
    return line


def _shortened(names: tuple[str, ...], shown_max: int = 6) -> Iterator[str]:
    yield from names[:shown_max]
    if len(names) > shown_max:
        yield f"… {len(names) - shown_max} more"


def _cut(text: str, chars_max: int = DETAIL_CHARS_MAX) -> str:
    text = " ".join(text.split())
    return text if len(text) <= chars_max else text[: chars_max - 1] + "…"


# --- events ---------------------------------------------------------------------------------------


def event_line(event: dict[str, Any]) -> str:
    """One event: its seq, type, node, and what matters most of its data."""
    if event["type"] == "gap":
        data = event["data"]
        return f"   … events {data['from']} to {data['to']} are not kept any more"
    node = event.get("node_id", "")
    level = "" if event["level"] == "INFO" else f"{event['level']} "
    line = f"{event['seq']:>4} {event['type']:<16} {level}{node}"
    detail = _cut(_detail(event))
    return f"{line}  {detail}".rstrip() if node or level else f"{line}{detail}".rstrip()


def _detail(event: dict[str, Any]) -> str:
    data = event["data"]
    match event["type"]:
        case "PLAN_GENERATED":
            rest = f", {len(goals)} goals to come" if (goals := data.get("open_goals")) else ""
            return (
                f"version {data['version']} by {data['author']}, {data['node_count']} nodes{rest}"
            )
        case "NODE_START":
            again = f" (attempt {event['attempt']})" if event.get("attempt", 1) > 1 else ""
            return f"{data.get('capability_id', '')}{again}"
        case "NODE_DONE":
            return duration(data.get("duration_ms"))
        case "NODE_RETRY":
            return f"in {duration(data['delay_ms'])}, {error_text(data.get('error'))}"
        case "NODE_BLOCKED" | "NODE_SKIPPED":
            asked = data.get("operator_prompt") or error_text(data.get("error"))
            return f"{data.get('reason', '')} {asked}"
        case "NODE_FAILED" | "RUN_FAILED":
            return error_text(data.get("error"))
        case "VALIDATION_ERROR" | "PLAN_REJECTED":
            faults = data.get("errors") or data.get("diagnostics") or []
            return "; ".join(f"{fault['pointer']} {fault['message']}" for fault in faults)
        case _:
            return _run_detail(event["type"], data)


def _run_detail(event_type: str, data: dict[str, Any]) -> str:
    """What matters of an event that is about no single node."""
    match event_type:
        case "RUN_QUEUED":
            origin = data.get("resumed_from")
            resumes = f"resumes {origin['run_id']}: " if origin else ""
            return f"{resumes}{data.get('objective', '')}"
        case "RUN_START" | "RUN_DONE":
            return ""
        case "PLAN_UPDATED":
            told = (f"{how} {', '.join(data[how])}" for how in ("added", "removed") if data[how])
            return f"by {data.get('policy_id') or data['cause']}: {'; '.join(told)}"
        case "POLICY_TRIGGERED":
            return f"{data['policy_id']}: {data['trigger']}, {data['action']}"
        case "RUN_PAUSED" | "RUN_RESUMED" | "RUN_CANCELLED":
            return _order(data)
        case "BREAKER_TRIPPED" | "BREAKER_HALF_OPEN" | "BREAKER_CLOSED":
            return f"{data['scope']}{' in one process only' if data['degraded'] else ''}"
        case _:
            return as_json(data, indent=None) if data else ""


def _order(data: dict[str, Any]) -> str:
    """Why a run stopped or goes on: the reason, the nodes it is about, who said so and why."""
    nodes = data.get("nodes") or []
    told = [f"{n}={said}" for n, said in nodes.items()] if isinstance(nodes, dict) else nodes
    who = (data.get("operator") or {}).get("id")
    reason = "" if data.get("reason") == "operator" else data.get("reason", "")
    said = " ".join(filter(None, (reason, ", ".join(told), f"by {who}" if who else "")))
    return ": ".join(filter(None, (said, data.get("note"))))


# --- results --------------------------------------------------------------------------------------


def result_lines(output: Any) -> Iterator[str]:
    """A run's output: briefs as something to read, everything else as JSON."""
    if isinstance(output, dict):
        rest = dict(output)
        for name, value in output.items():
            if _is_brief(value):
                del rest[name]
                yield from _brief_lines(value)
        if rest:
            yield from as_json(rest).splitlines()
    elif output is not None:
        yield from as_json(output).splitlines()


def _is_brief(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("title"), str)
        and isinstance(bullets := value.get("bullets"), list)
        and all(isinstance(bullet, dict) and "text" in bullet for bullet in bullets)
    )


def _brief_lines(brief: dict[str, Any]) -> Iterator[str]:
    """Title, summary, and every bullet with where it was found."""
    title = _cut(brief["title"], WIDTH_MAX)
    yield from (title, "=" * len(title))
    if summary := brief.get("summary"):
        yield from ("", *_wrapped(str(summary)))
    for bullet in brief["bullets"]:
        yield from ("", *_wrapped(str(bullet["text"]), first="  • ", rest="    "))
        if source := _source(bullet):
            yield f"      ↳ {source}"
    facts = [f"{fact['kind']} {fact['value']}" for fact in brief.get("facts") or ()]
    if facts:
        yield from ("", *_wrapped("Facts: " + " · ".join(facts)))


def _source(bullet: dict[str, Any]) -> str:
    parts = []
    if section := bullet.get("section"):
        parts.append(f"section “{_cut(str(section), WIDTH_MAX)}”")
    if line := bullet.get("line"):
        parts.append(f"line {line}")
    return ", ".join(parts)


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    width = max(min(console().width, WIDTH_MAX), 40)
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest)


def table_lines(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[Text]:
    """Columns as wide as what stands in them: ids stay whole, whatever the terminal."""
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(names, *cells, strict=True)]
    for number, row in enumerate([list(names), *cells]):
        padded = (cell + " " * (w - cell_len(cell)) for cell, w in zip(row, widths, strict=True))
        yield Text("  ".join(padded).rstrip(), style="dim" if number == 0 else "")


# --- plans ----------------------------------------------------------------------------------------


def plan_lines(plan: dict[str, Any]) -> Iterator[Text]:
    """A plan as a tree, with the proof: where every input comes from and why it fits."""
    yield Text(f"Plan version {plan['version']} by {plan['author']}, {len(plan['nodes'])} nodes")
    proofs: dict[str | None, list[dict[str, Any]]] = {}
    for step in plan["metadata"]["proof"]:
        proofs.setdefault(step["node_id"], []).append(step)
    nodes = {node["id"]: node for node in plan["nodes"]}
    requires = {name: tuple(node["requires"]) for name, node in nodes.items()}
    lines = laid_out(requires, GUIDED_DEPTH_MAX)
    # The guide to the nodes below a node also runs past its proof.
    followed = {a.node_id for a, b in itertools.pairwise(lines) if len(b.guide) > len(a.guide)}
    for guide, below, node_id in lines:
        node = nodes[node_id]
        line = Text()
        line.append(guide, style="dim")
        line.append(plain(node_id), style="bold")
        version = f"{plain(node['capability_id'])} {plain(node['capability_version'])}"
        line.append(f"  {version}  {node['effect']}", style="dim")
        yield line
        indent = f"{below}│    " if node_id in followed else f"{below}     "
        yield from (_proof_line(indent, step) for step in proofs.get(node_id, ()))
    outputs = [step for name, steps in proofs.items() if name not in nodes for step in steps]
    if outputs:
        yield Text("output", style="bold")
        yield from (_proof_line("   ", step) for step in outputs)


def _proof_line(indent: str, step: dict[str, Any]) -> Text:
    key = step["key"] or "(whole)"
    source = "the given value" if step["source"] is None else f"{step['source']}{step['pointer']}"
    line = Text()
    line.append(indent, style="dim")
    line.append(f"{plain(key)} ← {plain(source)}")
    style = "yellow" if step["fit"] == "checked_at_run" else "green"
    line.append(f"  {step['fit']}", style=style)
    line.append(f"  {plain(step['why'])}", style="dim")
    return line
