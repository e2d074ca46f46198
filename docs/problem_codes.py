"""The codes of problems and of broken rules, read from the source for `docs/generate.py`.

A code that is written where an error is raised needs no second list that could forget it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from app.api.errors import STATUS_AND_TITLE

ROOT = Path(__file__).parents[1]

_ERRORS = {kind.__name__: kind for kind in STATUS_AND_TITLE}
_FAULT_CODE = re.compile(r"^[A-Z][A-Z0-9]*(_[A-Z0-9]+)+$|^CYCLE$")


def problem_codes() -> list[tuple[str, str, str]]:
    """`(status, code, detail)` of every problem that the source raises, placeholders as `…`."""
    found: dict[tuple[str, str], str] = {}
    for name, kind in _ERRORS.items():
        if name != "FlexrunError":
            found.setdefault((str(STATUS_AND_TITLE[kind][0]), kind.code), "")
    for tree in _sources("app"):
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                raised = _ERRORS.get(call.func.id)
                if raised is not None and call.args:
                    status = str(STATUS_AND_TITLE[raised][0])
                    code = _keyword(call, "code") or raised.code
                    detail = _text_of(call.args[0])
                    found[status, code] = found.get((status, code)) or detail
    return [(status, f"`{code}`", detail) for (status, code), detail in sorted(found.items())]


def fault_codes() -> list[str]:
    """The UPPER_SNAKE codes of broken rules: where a fault is made, or its code is chosen."""
    found: set[str] = set()
    for folder in ("app/planner", "app/domain", "app/kit", "app/orchestrator"):
        for tree in _sources(folder):
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and _name_of(node.func) in _FAULT_MAKERS:
                    found.update(_codes_in(node.args))
                elif isinstance(node, ast.Assign) and _assigns_code(node.targets[0]):
                    found.update(_codes_in(ast.walk(node.value)))
    return sorted(found)


_FAULT_MAKERS = {"Fault", "refuse", "_refuse", "JsonRefused", "Unmergeable", "Violation", "_broken"}


def _assigns_code(target: ast.expr) -> bool:
    """`code = …`, or `code, why = …`."""
    first = target.elts[0] if isinstance(target, ast.Tuple) else target
    return _name_of(first) == "code"


def _codes_in(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and _FAULT_CODE.match(str(node.value)):
            yield str(node.value)


def _sources(folder: str) -> Iterator[ast.Module]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        if "cli" not in path.parts:
            yield ast.parse(path.read_text())


def _name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _keyword(call: ast.Call, name: str) -> str | None:
    for keyword in call.keywords:
        if keyword.arg == name and isinstance(keyword.value, ast.Constant):
            return str(keyword.value.value)
    return None


def _text_of(node: ast.expr) -> str:
    """A literal text; what is filled in at run time is `…`."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    return ""
