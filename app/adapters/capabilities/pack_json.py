"""Builtins on JSON values: `util.echo` and `json.query`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jmespath
from jmespath.exceptions import JMESPathError
from jmespath.visitor import TreeInterpreter

from app.adapters.capabilities.builtin import Pack
from app.adapters.capabilities.pack_facets import facets_named
from app.domain.capability import Effect, NodeKind
from app.kit.json_gate import JsonRefused, check_value
from app.ports import Call, CallFailed

QUERY_VISITS_MAX = 1_000_000
RESULT_WEIGHT_MAX = 4_000_000
# Only these can make a value that is larger than what they were given.
_GROWING = frozenset({"multi_select_list", "multi_select_dict", "flatten", "function_expression"})

_ANY_OBJECT: dict[str, Any] = {"type": "object"}

JSON_PACK = Pack("json", facets_named("query", "json_value", "json_result"))


@JSON_PACK.capability(
    capability_id="util.echo",
    version="1.0.0",
    display_name="Echo",
    summary="Gives back the object that it was given.",
    input_schema=_ANY_OBJECT,
    output_schema=_ANY_OBJECT,
    effect=Effect.PURE,
    timeout_s=5,
    inline=True,
)
def echo(call: Call) -> dict[str, Any]:
    """The inputs, as they are."""
    return dict(call.inputs)


@JSON_PACK.capability(
    capability_id="json.query",
    version="1.0.0",
    display_name="JSON query",
    summary="Selects and reshapes parts of a JSON value with a JMESPath expression.",
    inputs=["query", "json_value"],
    outputs=["json_result"],
    effect=Effect.PURE,
    node_kind=NodeKind.TRANSFORMATION,
    timeout_s=20,
)
def json_query(call: Call) -> dict[str, Any]:
    """`{query, json_value}` -> `{json_result}`.

    Raises CallFailed `query_invalid` (does not parse, or does not fit the value) and
    `query_too_large` (the work or the result is over the limit). Neither is retryable.
    """
    return {"json_result": run_query(call.inputs["query"], call.inputs["json_value"])}


def run_query(expression: str, value: Any) -> Any:
    """The result of a JMESPath expression, bounded in work and in size."""
    try:
        parsed = jmespath.compile(expression).parsed
        result = _BoundedInterpreter().visit(parsed, value)
        _weigh(result, RESULT_WEIGHT_MAX)
        check_value(result)
    except JMESPathError as error:
        text = " ".join(str(error).split())[:300]
        raise CallFailed("query_invalid", f"the query failed: {text}", retryable=False) from error
    except JsonRefused as error:
        text = f"the query makes a value that is no strict JSON: {error.detail}"
        raise CallFailed("query_invalid", text, retryable=False) from error
    except RecursionError as error:
        raise _too_large("is nested too deeply") from error
    return result


class _BoundedInterpreter(TreeInterpreter):  # type: ignore[misc]  # jmespath has no types
    """JMESPath can double a value with every step (`[@,@][]|[@,@][] …`): count what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self._visits_left = QUERY_VISITS_MAX
        self._weight_left = 2 * RESULT_WEIGHT_MAX

    def visit(self, node: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._visits_left -= 1
        if self._visits_left < 0:
            raise _too_large("takes too many steps")
        result = super().visit(node, *args, **kwargs)
        if node["type"] in _GROWING:
            self._weight_left -= _weigh(result, self._weight_left)
        return result


def _weigh(value: Any, weight_max: int) -> int:
    """Count values and characters as they would be written out; shared parts count every time."""
    weight = 0
    waiting = [value]
    while waiting:
        found = waiting.pop()
        weight += 1
        if isinstance(found, str):
            weight += len(found)
        elif isinstance(found, list | tuple):
            waiting.extend(found)
        elif isinstance(found, Mapping):
            weight += sum(len(key) for key in found)
            waiting.extend(found.values())
        if weight + len(waiting) > weight_max:
            raise _too_large("makes too large a result")
    return weight


def _too_large(what: str) -> CallFailed:
    return CallFailed("query_too_large", f"the query {what}", retryable=False)
