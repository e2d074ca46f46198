"""Chooses the model of a call, and says why: by flags, window, cost, and who is worth calling now.

Pure and deterministic: the same need, catalog and breakers give the same choice, whatever the order
of the catalog. Models are looked at in one order, the preferred ones as they were named and then
all others, cheapest first; the first that fits is chosen. What was passed over before it is told
with a stable word; what comes behind it was not needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Self, TypeAlias

from app.domain.chat import AnswerForm, ModelRole, Prompt, Usage
from app.llm.catalog import Catalog, Model
from app.llm.models_file import CostTier
from app.llm.tokens import TokenCounter, projected, texts_of

OUTPUT_TOKENS_GUESSED = 1_024
"""What an answer is taken for that nobody has limited, if its model can write so much."""

Numbers: TypeAlias = Mapping[str, int | float]
_NONE: Mapping[str, Any] = MappingProxyType({})


class Why(StrEnum):
    """Why a model is passed over, in the order in which it is asked.

    `overflow`: prompt, output and margin are more than its window; `output_overflow`: the output is
    more than it can write. What is asked last depends on the hour, all before it on the catalog.
    """

    UNKNOWN_MODEL = "unknown_model"
    FORBIDDEN = "forbidden"
    WRONG_ROLE = "wrong_role"
    NO_JSON = "no_json"
    NO_TOOLS = "no_tools"
    TOO_EXPENSIVE = "too_expensive"
    NOT_AVAILABLE = "not_available"
    OUTPUT_OVERFLOW = "output_overflow"
    OVERFLOW = "overflow"
    TRIED = "tried"
    BREAKER_OPEN = "breaker_open"


class Reason(StrEnum):
    """Why the chosen one.

    `preferred`: it is the first choice of the caller. `cheapest`: nobody was preferred, and it is
    the cheapest that can do it. `fallback`: one that is preferred, or one that is cheaper and could
    do a smaller prompt or at another time, was passed over. `no_compatible_model`: nobody can.
    """

    PREFERRED = "preferred"
    CHEAPEST = "cheapest"
    FALLBACK = "fallback"
    NO_COMPATIBLE_MODEL = "no_compatible_model"


_STATIC = frozenset(
    {Why.FORBIDDEN, Why.WRONG_ROLE, Why.NO_JSON, Why.NO_TOOLS, Why.TOO_EXPENSIVE, Why.NOT_AVAILABLE}
)


@dataclass(frozen=True, slots=True)
class Need:
    """What a call needs of its model. `texts` is all that is sent: it is counted, never kept.

    `output_tokens`: the limit of the answer, None when there is none. `preferred` and `forbidden`
    are names of the catalog, the preferred ones best first.
    """

    role: ModelRole = ModelRole.CHAT
    json_mode: bool = False
    function_calling: bool = False
    texts: tuple[str, ...] = field(default=(), repr=False)
    output_tokens: int | None = None
    preferred: tuple[str, ...] = ()
    forbidden: Collection[str] = ()
    cost_tier_max: CostTier = CostTier.HIGH

    @classmethod
    def of(cls, prompt: Prompt, role: ModelRole | None = None) -> Self:
        """The need of a prompt, in another role where one is given."""
        return cls(
            role=role or prompt.role,
            json_mode=prompt.form is AnswerForm.JSON,
            function_calling=bool(prompt.tools),
            texts=texts_of(prompt.messages, prompt.tools, prompt.schema),
            output_tokens=prompt.output_tokens_max,
            preferred=prompt.preferred,
        )


@dataclass(frozen=True, slots=True)
class Projection:
    """What a call will take of one model: `tokens` are both kinds with the margin."""

    prompt_tokens: int
    output_tokens: int
    tokens: int
    cost_usd: Decimal


@dataclass(frozen=True, slots=True)
class Rejected:
    """A model that was passed over. `numbers` are those that decided, by name."""

    model: str
    why: str
    numbers: Numbers = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Selection:
    """The choice. `chosen` and `projection` are None when nobody fits."""

    chosen: str | None
    reason: Reason
    role: ModelRole
    rejected: tuple[Rejected, ...]
    projection: Projection | None = None

    @property
    def retry_after_s(self) -> float | None:
        """When somebody fits, if all that could do it have an open breaker."""
        if self.chosen is not None:
            return None
        waits = (found.numbers.get("retry_after_s") for found in self.rejected)
        return min((wait for wait in waits if wait is not None), default=None)

    def as_dict(self) -> dict[str, Any]:
        """The data of the event MODEL_SELECTED."""
        return {
            "chosen": self.chosen,
            "reason": self.reason.value,
            "role": self.role.value,
            "rejected": [{"model": found.model, "why": found.why} for found in self.rejected],
        }


def select(
    catalog: Catalog,
    need: Need,
    *,
    passed_over: Mapping[str, str] = _NONE,
    open_breakers: Mapping[str, float] = _NONE,
) -> Selection:
    """The first model, in the order of the module, that can take the call.

    `passed_over`: models that shall not be asked again, with the caller's word for why, such as
    `tried`. `open_breakers`: the providers that are not worth calling now, by name, with the
    seconds until they are.
    """
    projections = _projections(catalog, need)
    rejected: list[Rejected] = []
    for name in _in_order(catalog, need, projections):
        model = catalog.models.get(name)
        if model is None:
            rejected.append(Rejected(name, Why.UNKNOWN_MODEL))
            continue
        found = (
            _unfit(catalog, need, model)
            or _overflow(model, projections[name])
            or _not_now(model, passed_over, open_breakers)
        )
        if found is None:
            reason = _reason(need, name, rejected)
            return Selection(name, reason, need.role, tuple(rejected), projections[name])
        rejected.append(found)
    return Selection(None, Reason.NO_COMPATIBLE_MODEL, need.role, tuple(rejected))


def _projections(catalog: Catalog, need: Need) -> dict[str, Projection]:
    counts: dict[TokenCounter, int] = {}  # models that count alike count once
    found = {}
    for name, model in catalog.models.items():
        counter = catalog.counters[name]
        if counter not in counts:
            counts[counter] = counter(need.texts)
        prompt_tokens, output_tokens = counts[counter], _output_tokens(need, model)
        found[name] = Projection(
            prompt_tokens,
            output_tokens,
            projected(prompt_tokens, output_tokens),
            model.prices.cost_usd(Usage(prompt_tokens, output_tokens)),
        )
    return found


def _output_tokens(need: Need, model: Model) -> int:
    if need.role is ModelRole.EMBEDDING:
        return 0
    if need.output_tokens is None:
        return min(OUTPUT_TOKENS_GUESSED, model.output_tokens_max)
    return need.output_tokens


def _in_order(catalog: Catalog, need: Need, projections: Mapping[str, Projection]) -> Iterator[str]:
    def cheapest(name: str) -> tuple[int, Decimal, str]:
        return catalog.models[name].cost_tier.rank, projections[name].cost_usd, name

    preferred = dict.fromkeys(need.preferred)
    yield from preferred
    yield from (name for name in sorted(catalog.models, key=cheapest) if name not in preferred)


def _unfit(catalog: Catalog, need: Need, model: Model) -> Rejected | None:
    """What keeps a model from all calls of this kind."""
    broken = {
        Why.FORBIDDEN: model.name in need.forbidden,
        Why.WRONG_ROLE: need.role not in model.roles,
        Why.NO_JSON: need.json_mode and not model.json_mode,
        Why.NO_TOOLS: need.function_calling and not model.function_calling,
        Why.TOO_EXPENSIVE: model.cost_tier.rank > need.cost_tier_max.rank,
        Why.NOT_AVAILABLE: bool(catalog.unavailable(model)),
    }
    return next((Rejected(model.name, why) for why, is_broken in broken.items() if is_broken), None)


def _overflow(model: Model, call: Projection) -> Rejected | None:
    """What keeps a model from a call of this size."""
    if call.output_tokens > model.output_tokens_max:
        numbers = {
            "output_tokens": call.output_tokens,
            "output_tokens_max": model.output_tokens_max,
        }
        return Rejected(model.name, Why.OUTPUT_OVERFLOW, numbers)
    if call.tokens > model.ctx_window:
        numbers = {"projected_tokens": call.tokens, "ctx_window": model.ctx_window}
        return Rejected(model.name, Why.OVERFLOW, numbers)
    return None


def _not_now(
    model: Model, passed_over: Mapping[str, str], open_breakers: Mapping[str, float]
) -> Rejected | None:
    """What keeps a model that fits from being called now."""
    if model.name in passed_over:
        return Rejected(model.name, passed_over[model.name])
    if model.provider in open_breakers:
        wait = {"retry_after_s": open_breakers[model.provider]}
        return Rejected(model.name, Why.BREAKER_OPEN, wait)
    return None


def _reason(need: Need, chosen: str, rejected: list[Rejected]) -> Reason:
    if chosen in need.preferred and not rejected:
        return Reason.PREFERRED
    is_second = need.preferred or any(found.why not in _STATIC for found in rejected)
    return Reason.FALLBACK if is_second else Reason.CHEAPEST
