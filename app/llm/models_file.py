"""The operator's `models.yaml`: its shape, and how it is read.

Only `catalog.py` reads it. A file with a fault is refused as a whole, and every fault is said with
the model or provider and the field. Nothing of the file's text gets into an error, except names and
keys: it may hold a secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
    model_validator,
)

from app.domain.chat import ModelRole, Usage
from app.domain.errors import Fault, FlexrunError
from app.kit.json_pointer import escape

FILE_BYTES_MAX = 256 * 1024
FAULTS_TOLD_MAX = 20
MTOK = 1_000_000

ProviderKind: TypeAlias = Literal["openai", "anthropic", "ollama", "yandex"]
OpenAiApi: TypeAlias = Literal["chat", "responses"]
Place: TypeAlias = tuple[int | str, ...]
"""The keys that lead to a value of the file."""


class ModelsInvalid(FlexrunError):
    """The file of models can not be used; its text has a line for each fault."""

    code = "models_invalid"


class CostTier(StrEnum):
    """How dear a model is, as its operator sees it; the cheapest first."""

    FREE = "free"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"

    @property
    def rank(self) -> int:
        return list(CostTier).index(self)


# --- its shape ------------------------------------------------------------------------------------


def _decimal(value: object) -> Decimal:
    if isinstance(value, Decimal):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?", value):
        return Decimal(value)
    raise ValueError('Input should be a decimal in quotes, such as "0.15"')


Usd = Annotated[Decimal, BeforeValidator(_decimal)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$")]
Text = Annotated[str, StringConstraints(min_length=1)]
# Only upper case, so that a key put here by mistake is refused and not told as missing.
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Z_][A-Z0-9_]{0,99}$")]
# Not lenient: "yes" is no flag, and 8192.0 no number of tokens.
Flag = Annotated[bool, Strict()]
Tokens = Annotated[int, Strict(), Field(ge=0)]
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Prices(_Entry):
    """US dollars for a million tokens. Cached tokens cost as much as others where none is given."""

    input_usd_per_mtok: Usd
    output_usd_per_mtok: Usd
    cached_usd_per_mtok: Usd | None = None

    def cost_usd(self, usage: Usage) -> Decimal:
        """What these tokens cost, exactly."""
        cached = self.cached_usd_per_mtok
        return (
            (usage.tokens_in - usage.tokens_cached) * self.input_usd_per_mtok
            + usage.tokens_cached * (self.input_usd_per_mtok if cached is None else cached)
            + usage.tokens_out * self.output_usd_per_mtok
        ) / MTOK


NO_PRICES = Prices(input_usd_per_mtok=Decimal(0), output_usd_per_mtok=Decimal(0))


class TokenizerEntry(_Entry):
    """How tokens are counted before a call: by a `tokenizer.json`, or by characters."""

    file: Path | None = None
    chars_per_token: Positive | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.file is None) == (self.chars_per_token is None):
            raise ValueError("Input should be either file or chars_per_token")
        return self


class ModelEntry(_Entry):
    """An entry of `models`. `model` is the vendor's name where it is not the entry's own;
    `{project}` in it stands for the project of the provider."""

    provider: str
    model: Text | None = None
    ctx_window: Annotated[Tokens, Field(ge=1)]
    output_tokens_max: Tokens
    json_mode: Flag
    function_calling: Flag
    cost_tier: CostTier
    prices: Prices = NO_PRICES
    tokenizer: TokenizerEntry | None = None
    roles: Annotated[tuple[ModelRole, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _has_prices(self) -> Self:
        if "prices" not in self.model_fields_set and self.cost_tier is not CostTier.FREE:
            raise ValueError("prices are needed, unless cost_tier is free")
        return self


class ProviderEntry(_Entry):
    """An entry of `providers`. What ends in `_env` names an environment variable, whose value wins
    over one that the file gives. `timeout_s`: of one call, instead of the setting's."""

    kind: ProviderKind
    base_url: Text | None = None
    base_url_env: VariableName | None = None
    key_env: VariableName | None = None
    headers: dict[str, str] = Field(default_factory=dict, repr=False)
    project: Text | None = None
    project_env: VariableName | None = None
    api: OpenAiApi = "chat"
    timeout_s: Positive | None = None

    @model_validator(mode="after")
    def _has_address(self) -> Self:
        if self.base_url is None and self.base_url_env is None:
            raise ValueError("base_url or base_url_env is needed")
        return self


class ModelsFile(_Entry):
    """The whole file."""

    providers: dict[Name, ProviderEntry] = Field(default_factory=dict)
    models: dict[Name, ModelEntry] = Field(default_factory=dict)


# --- how it is read -------------------------------------------------------------------------------


def read_models_file(path: Path) -> ModelsFile:
    """The file, valid in itself: every model has a provider in it. Raises `ModelsInvalid`."""
    try:
        found = ModelsFile.model_validate(_yaml(path))
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)
        faults = [(e["type"], e["loc"], e["msg"].removeprefix("Value error, ")) for e in wrong]
        raise invalid(path, faults) from None
    faults = list(_lost(found))
    if faults:
        raise invalid(path, faults)
    return found


def _lost(found: ModelsFile) -> Iterator[tuple[str, Place, str]]:
    """What models refer to and the file does not have."""
    for name, model in found.models.items():
        provider = found.providers.get(model.provider)
        if provider is None:
            text = "no such provider is in the file"
            yield "provider_unknown", ("models", name, "provider"), text
        elif "{project}" in (model.model or "") and not (provider.project or provider.project_env):
            yield "project_unknown", ("models", name, "model"), "its provider has no project"


def invalid(path: Path, faults: Iterable[tuple[str, Place, str]]) -> ModelsInvalid:
    """The error for faults `(code, place, message)`, of which 20 are told."""
    told = list(faults)[:FAULTS_TOLD_MAX]
    lines = [f"  {_words(place)}: {message}" for _, place, message in told]
    return ModelsInvalid(
        "\n".join([f"{path} is not valid:", *lines]),
        faults=[Fault(code, message, _pointer(place)) for code, place, message in told],
    )


def _words(place: Place) -> str:
    """`("models", "x", "prices", "input_usd_per_mtok")` as "model x, prices.input_usd_per_mtok"."""
    kind, *rest = map(str, place or ("file",))
    if kind not in ModelsFile.model_fields or not rest:
        return ".".join([kind, *rest])
    name, *field = rest
    return f"{kind.removesuffix('s')} {name}" + (f", {'.'.join(field)}" if field else "")


def _pointer(place: Place) -> str:
    return "".join(f"/{escape(str(key))}" for key in place)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, where PyYAML would take the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _KeyTwice(problem="a key stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


class _KeyTwice(yaml.MarkedYAMLError):
    pass


def _yaml(path: Path) -> Any:
    """What the file holds; an empty one is an empty mapping."""
    try:
        with path.open("rb") as file:
            text = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ModelsInvalid(f"{path} can not be read ({type(error).__name__}).") from None
    if len(text) > FILE_BYTES_MAX:
        raise ModelsInvalid(f"{path} is larger than {FILE_BYTES_MAX} bytes.")
    try:
        found = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = "a key stands twice" if isinstance(error, _KeyTwice) else "this is no valid YAML"
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ModelsInvalid(f"{path}{line}: {what}.") from None
    return {} if found is None else found
