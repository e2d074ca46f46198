"""The catalog: all models that the operator's file names, and whether each can be called.

It is made once, at start. A provider without its address or its key is no fault: its models are in
the catalog, and can not be chosen. Nothing is called from here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from pydantic import SecretStr

from app.llm.models_file import (
    ModelEntry,
    ModelsFile,
    OpenAiApi,
    ProviderEntry,
    ProviderKind,
    TokenizerEntry,
    invalid,
    read_models_file,
)
from app.llm.tokens import CharacterCounter, FileCounter, TokenCounter, TokenizerUnusable

DEFAULT_FILE = Path("models.yaml")

Variable: TypeAlias = Callable[[str], SecretStr | None]
"""The value of an environment variable; None when it is not set."""


class Model(ModelEntry):
    """A model of the catalog. `vendor_name` is what its provider calls it."""

    name: str
    vendor_name: str


@dataclass(frozen=True, slots=True)
class ProviderAccess:
    """Where a provider is and how it is called. `unavailable`: why it can not be, else ""."""

    name: str
    kind: ProviderKind
    base_url: str = field(default="", repr=False)
    key: SecretStr | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    project: str | None = None
    api: OpenAiApi = "chat"
    timeout_s: float | None = None
    unavailable: str = ""

    @property
    def breaker_scope(self) -> str:
        """`tool::host` of its breaker, the same in every process."""
        return f"llm::{self.name}"


@dataclass(frozen=True, slots=True)
class Catalog:
    """Providers, models, and the counter of each model's tokens, by name and sorted."""

    providers: Mapping[str, ProviderAccess] = field(default_factory=dict)
    models: Mapping[str, Model] = field(default_factory=dict)
    counters: Mapping[str, TokenCounter] = field(default_factory=dict)

    def unavailable(self, model: Model) -> str:
        """Why a model can not be called, "" when it can."""
        return self.providers[model.provider].unavailable


SWITCHED_OFF = "switched off by FLEXRUN_MODELS_ENABLED"
PLACEHOLDER = re.compile(
    r"(sk-)?(\.{3}|…|x{3,}|<.*>|changeme|change[-_]me|placeholder|your[-_ ].*)", re.IGNORECASE
)
"""Keys as examples and templates have them: to call with one would only open a breaker."""


def load_catalog(path: Path | None, variable: Variable, *, is_enabled: bool = True) -> Catalog:
    """The catalog of this file; else of `models.yaml` in the working directory, if there is one;
    else an empty one. Paths of tokenizers are relative to the file. Raises `ModelsInvalid`.

    Without `is_enabled` it says of every provider that it is switched off.
    """
    if path is None and not DEFAULT_FILE.exists():
        return Catalog()
    path = path or DEFAULT_FILE
    found = read_models_file(path)
    counters = _counters(path, found)
    providers = {name: _access(name, entry, variable) for name, entry in found.providers.items()}
    if not is_enabled:
        providers = {n: replace(one, unavailable=SWITCHED_OFF) for n, one in providers.items()}
    models = {
        name: Model(
            name=name,
            vendor_name=_vendor_name(name, entry, providers[entry.provider]),
            **dict(entry),
        )
        for name, entry in found.models.items()
    }
    return Catalog(dict(sorted(providers.items())), dict(sorted(models.items())), counters)


def _vendor_name(name: str, entry: ModelEntry, provider: ProviderAccess) -> str:
    found = entry.model or name
    return found if provider.project is None else found.replace("{project}", provider.project)


def _access(name: str, entry: ProviderEntry, variable: Variable) -> ProviderAccess:
    def value(of: str | None) -> SecretStr | None:
        return None if of is None else variable(of)

    def text(of: str | None, given: str | None) -> str | None:
        found = value(of)
        return given if found is None else found.get_secret_value()

    base_url, key = text(entry.base_url_env, entry.base_url), value(entry.key_env)
    project = text(entry.project_env, entry.project)
    needed = {entry.base_url_env: base_url, entry.key_env: key, entry.project_env: project}
    missing = [of for of, found in needed.items() if of is not None and found is None]
    return ProviderAccess(
        name,
        entry.kind,
        base_url=base_url or "",
        key=key,
        headers=entry.headers,
        project=project,
        api=entry.api,
        timeout_s=entry.timeout_s,
        unavailable=_not_set(missing) or _no_key(entry.key_env, key),
    )


def _not_set(names: list[str]) -> str:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not set" if names else ""


def _no_key(name: str | None, key: SecretStr | None) -> str:
    if key is None or not PLACEHOLDER.fullmatch(key.get_secret_value().strip()):
        return ""
    return f"{name} is a placeholder"


def _counters(path: Path, found: ModelsFile) -> dict[str, TokenCounter]:
    counters: dict[str, TokenCounter] = {}
    read: dict[Path, TokenCounter] = {}  # files are large, and models share them
    faults = []
    for name, entry in sorted(found.models.items()):
        try:
            counters[name] = _counter(entry.tokenizer, path.parent, read)
        except TokenizerUnusable as error:
            faults.append(("tokenizer_unusable", ("models", name, "tokenizer.file"), str(error)))
    if faults:
        raise invalid(path, faults)
    return counters


def _counter(
    entry: TokenizerEntry | None, folder: Path, read: dict[Path, TokenCounter]
) -> TokenCounter:
    if entry is None:
        return CharacterCounter()
    if entry.chars_per_token is not None:
        return CharacterCounter(entry.chars_per_token)
    assert entry.file is not None  # one of both is given
    file = folder / entry.file.expanduser()
    if file not in read:
        read[file] = FileCounter(file)
    return read[file]
