"""Tools: capabilities that a capability of kind `llm` lets its model call, by `config.tools`.

    "tools": ["units.convert", {"capability_id": "soil.lookup", "version": "1.2.0"}]

Without a version it is the newest active one at the time of the call. A tool has no tools itself,
so that no chain of models can run away. Its effect is not stronger than that of the capability
which calls it: whoever repeats the one repeats the other. What is registered later may break these
rules again, so a call holds to them, too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

from app.domain.capability import Capability, CapabilityId, CapabilityKind, Effect, Registration
from app.domain.chat import ANSWER_TOOL, Tool
from app.domain.errors import Fault
from app.domain.system_prompt import line_of

TOOLS_MAX = 32
NAME_CHARS_MAX = 64
"""Of a tool, for every provider: of letters, digits, `_` and `-`."""

Find = Callable[[str, str | None], Capability | None]
"""The capability of an id and a version; without a version the newest active one."""


class ToolRef(BaseModel):
    """One tool, by its id or by id and version."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    capability_id: CapabilityId
    version: str | None = Field(default=None, min_length=1, max_length=64)


def _with_id(value: Any) -> Any:
    return {"capability_id": value} if isinstance(value, str) else value


def _unique(refs: list[ToolRef]) -> list[ToolRef]:
    if len({ref.capability_id for ref in refs}) != len(refs):
        raise ValueError("a capability is named twice")
    return refs


ToolRefs = Annotated[
    list[Annotated[ToolRef, BeforeValidator(_with_id)]],
    Field(max_length=TOOLS_MAX),
    AfterValidator(_unique),
]
_refs: TypeAdapter[list[ToolRef]] = TypeAdapter(ToolRefs)


def tools_of(registration: Registration) -> list[ToolRef]:
    """The tools that a registration names; its config was checked before."""
    if registration.kind is not CapabilityKind.LLM:
        return []
    return _refs.validate_python(registration.config.get("tools", []))


def is_stronger(effect: Effect, other: Effect) -> bool:
    """Whether repeating the one may do what repeating the other may not."""
    order = list(Effect)
    return order.index(effect) > order.index(other)


def tool_faults(capability: Capability, find: Find) -> list[Fault]:
    """What keeps a capability from having the tools that it names, as the registry is now."""
    refs = enumerate(tools_of(capability.registration))
    faults = [_fault_of(capability, ref, f"/config/tools/{index}", find) for index, ref in refs]
    return [fault for fault in faults if fault is not None]


def _fault_of(capability: Capability, ref: ToolRef, pointer: str, find: Find) -> Fault | None:
    refuse = partial(Fault, pointer=pointer, capability_id=capability.capability_id)
    if ref.capability_id == capability.capability_id:
        return refuse("TOOL_IS_ITSELF", "A capability can not be its own tool.")
    tool = find(ref.capability_id, ref.version)
    if tool is None:
        named = ref.capability_id if ref.version is None else f"{ref.capability_id} {ref.version}"
        return refuse("TOOL_NOT_FOUND", f"{named} is not registered, or not active.")
    if tools_of(tool.registration):
        return refuse("TOOL_HAS_TOOLS", f"{ref.capability_id} has tools itself.")
    effect, own_effect = tool.registration.effect, capability.registration.effect
    if is_stronger(effect, own_effect):
        text = f"{ref.capability_id} is {effect}, but repeated like this capability: {own_effect}."
        return refuse("TOOL_EFFECT_TOO_STRONG", text)
    return None


def named_tools(capabilities: Iterable[Capability]) -> dict[str, Capability]:
    """Tools by the names that a model knows them by: unique, and within what providers allow."""
    found: dict[str, Capability] = {}
    for capability in capabilities:
        name = re.sub(r"[^a-zA-Z0-9_-]", "_", capability.capability_id)
        if len(name) > NAME_CHARS_MAX or name in found or name == ANSWER_TOOL:
            digest = hashlib.sha256(capability.capability_id.encode()).hexdigest()[:12]
            name = f"{name[: NAME_CHARS_MAX - 13]}_{digest}"
        found[name] = capability
    return found


def tool_as_told(name: str, capability: Capability) -> Tool:
    """What a model is told of a tool: what it does, and the meaning and shape of its inputs."""
    registration = capability.registration
    lines = [f"{registration.display_name}: {registration.summary}"]
    lines += [line_of(found) for found in capability.input.properties.values()]
    return Tool(name, "\n".join(lines), {**capability.input.schema, "type": "object"})
