"""The catalog of models: what a file may say, how a wrong one is refused, and what is available."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from copy import deepcopy
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from app.domain.chat import ChatRole, Message, ModelRole, Tool, ToolCall, Usage
from app.llm.catalog import SWITCHED_OFF, Catalog, Variable, load_catalog
from app.llm.models_file import FAULTS_TOLD_MAX, FILE_BYTES_MAX, CostTier, ModelsInvalid, Prices
from app.llm.tokens import CharacterCounter, projected, texts_of

SHIPPED = Path(__file__).parents[2] / "models.yaml"
CANARY = "canary-7f3a"
HAS_TOKENIZERS = importlib.util.find_spec("tokenizers") is not None
VALID: dict[str, Any] = {
    "providers": {
        "here": {"kind": "ollama", "base_url": "http://127.0.0.1:11434"},
        "far": {
            "kind": "yandex",
            "base_url": "https://models.example.com/v1",
            "base_url_env": "FAR_URL",
            "key_env": "FAR_KEY",
            "project_env": "FAR_PROJECT",
            "headers": {"X-Team": CANARY},
        },
    },
    "models": {
        "small": {
            "provider": "here",
            "ctx_window": 4096,
            "output_tokens_max": 1024,
            "json_mode": True,
            "function_calling": False,
            "cost_tier": "free",
            "roles": ["chat"],
        },
        "large": {
            "provider": "far",
            "model": "gpt://{project}/large",
            "ctx_window": 128_000,
            "output_tokens_max": 8_000,
            "json_mode": True,
            "function_calling": True,
            "cost_tier": "high",
            "prices": {"input_usd_per_mtok": "1.50", "output_usd_per_mtok": "6"},
            "tokenizer": {"chars_per_token": 2.5},
            "roles": ["chat", "planning"],
        },
    },
}


def variables(**values: str) -> Variable:
    """An environment."""

    def variable(name: str) -> SecretStr | None:
        return SecretStr(values[name]) if name in values else None

    return variable


def written(folder: Path, content: object) -> Path:
    """A file of models, from a value or as it stands."""
    path = folder / "models.yaml"
    text = content if isinstance(content, str | bytes) else yaml.safe_dump(content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def loaded(folder: Path, content: object = VALID, **values: str) -> Catalog:
    return load_catalog(written(folder, content), variables(**values))


def refused(folder: Path, content: object, **values: str) -> ModelsInvalid:
    with pytest.raises(ModelsInvalid) as caught:
        loaded(folder, content, **values)
    assert caught.value.code == "models_invalid"
    assert CANARY not in caught.value.detail
    return caught.value


# --- what is in it --------------------------------------------------------------------------------


def test_models_are_listed_by_name_with_all_that_the_file_says(tmp_path: Path) -> None:
    catalog = loaded(tmp_path, FAR_KEY="k", FAR_PROJECT="f-1")

    assert list(catalog.models) == ["large", "small"]
    large, small = catalog.models.values()
    assert (large.provider, large.vendor_name) == ("far", "gpt://f-1/large")
    assert (large.ctx_window, large.output_tokens_max) == (128_000, 8_000)
    assert large.roles == (ModelRole.CHAT, ModelRole.PLANNING)
    assert large.prices.input_usd_per_mtok == Decimal("1.50")
    assert (small.vendor_name, small.cost_tier) == ("small", CostTier.FREE)
    assert small.prices.cost_usd(Usage(1_000, 1_000)) == 0
    assert catalog.counters["large"](["12345", "678901"]) == 5  # 11 characters at 2.5
    assert catalog.counters["small"](["12345"]) == 2


def test_a_provider_is_available_once_all_that_it_names_is_set(tmp_path: Path) -> None:
    catalog = loaded(tmp_path)
    far, here = catalog.providers.values()
    assert far.unavailable == "FAR_KEY and FAR_PROJECT are not set"
    assert here.unavailable == ""
    assert catalog.unavailable(catalog.models["large"]) == far.unavailable
    assert catalog.unavailable(catalog.models["small"]) == ""
    assert catalog.models["large"].vendor_name == "gpt://{project}/large"

    far = loaded(tmp_path, FAR_KEY="k").providers["far"]
    assert far.unavailable == "FAR_PROJECT is not set"

    far = loaded(tmp_path, FAR_KEY="k", FAR_PROJECT="f-1").providers["far"]
    assert far.unavailable == ""
    assert far.base_url == "https://models.example.com/v1"
    assert far.breaker_scope == "llm::far"


def test_an_address_in_a_variable_wins_over_the_one_in_the_file(tmp_path: Path) -> None:
    far = loaded(tmp_path, FAR_URL="http://127.0.0.1:1/v1", FAR_KEY="k").providers["far"]
    assert far.base_url == "http://127.0.0.1:1/v1"


def test_an_address_only_in_a_variable_has_to_be_set(tmp_path: Path) -> None:
    content = {"providers": {"here": {"kind": "ollama", "base_url_env": "HERE_URL"}}}
    assert loaded(tmp_path, content).providers["here"].unavailable == "HERE_URL is not set"
    found = loaded(tmp_path, content, HERE_URL="http://127.0.0.1:1").providers["here"]
    assert (found.unavailable, found.key) == ("", None)


def test_keys_addresses_and_headers_are_in_no_repr(tmp_path: Path) -> None:
    url = f"https://{CANARY}.example.com/v1"
    catalog = loaded(tmp_path, FAR_KEY=CANARY, FAR_URL=url, FAR_PROJECT="f-1")

    assert catalog.providers["far"].key == SecretStr(CANARY)
    assert CANARY not in repr(catalog)


def test_an_empty_file_is_an_empty_catalog(tmp_path: Path) -> None:
    assert loaded(tmp_path, "# nothing yet\n") == Catalog()


def test_without_a_setting_the_file_of_the_working_directory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_catalog(None, variables()) == Catalog()
    written(tmp_path, VALID)
    assert set(load_catalog(None, variables()).models) == {"small", "large"}


# --- what is refused ------------------------------------------------------------------------------


def changed(*keys: str, value: object = None, drop: bool = False) -> dict[str, Any]:
    """The valid file with one value changed or dropped."""
    content = deepcopy(VALID)
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    if drop:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return content


FLAGS = (
    "provider",
    "ctx_window",
    "output_tokens_max",
    "json_mode",
    "function_calling",
    "cost_tier",
    "roles",
)


@pytest.mark.parametrize("flag", FLAGS)
def test_a_missing_flag_is_refused_with_the_name_of_the_model(tmp_path: Path, flag: str) -> None:
    error = refused(tmp_path, changed("models", "small", flag, drop=True))

    assert f"\n  model small, {flag}: Field required" in error.detail
    assert [fault.pointer for fault in error.faults] == [f"/models/small/{flag}"]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("ctx_window", "8192"),
        ("ctx_window", 8192.0),
        ("ctx_window", True),
        ("ctx_window", 0),
        ("output_tokens_max", -1),
        ("json_mode", "yes"),
        ("json_mode", 1),
        ("json_mode", None),
        ("function_calling", "true"),
        ("cost_tier", "cheap"),
        ("cost_tier", 1),
        ("roles", []),
        ("roles", ["poet"]),
        ("roles", "chat"),
        ("provider", "nobody"),
        ("model", ""),
        ("model", "gpt://{project}/small"),  # its provider has none
        ("prices", {"input_usd_per_mtok": "1"}),
        ("prices", {"input_usd_per_mtok": 1.5, "output_usd_per_mtok": "1"}),
        ("prices", {"input_usd_per_mtok": "-1", "output_usd_per_mtok": "1"}),
        ("prices", {"input_usd_per_mtok": "NaN", "output_usd_per_mtok": "1"}),
        ("tokenizer", {}),
        ("tokenizer", {"chars_per_token": 0}),
        ("tokenizer", {"chars_per_token": 4, "file": "tokenizer.json"}),
        ("tokenizer", {"file": "not/there.json"}),
        ("colour", "blue"),
        ("name", "other"),
    ],
)
def test_a_wrong_flag_is_refused_with_the_name_of_the_model(
    tmp_path: Path, flag: str, value: object
) -> None:
    error = refused(tmp_path, changed("models", "small", flag, value=value))

    assert f"\n  model small, {flag}" in error.detail
    assert error.faults[0].pointer.startswith(f"/models/small/{flag}")


def test_only_a_free_model_needs_no_prices(tmp_path: Path) -> None:
    error = refused(tmp_path, changed("models", "large", "prices", drop=True))
    assert "\n  model large: prices are needed, unless cost_tier is free" in error.detail


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("kind", "acme", "provider far, kind"),
        ("api", "soap", "provider far, api"),
        ("key_env", CANARY, "provider far, key_env"),
        ("key_env", "abc123", "provider far, key_env"),
        ("key", CANARY, "provider far, key"),
        ("headers", {"X-Team": 1}, "provider far, headers.X-Team"),
        ("timeout_s", 0, "provider far, timeout_s"),
        ("timeout_s", float("inf"), "provider far, timeout_s"),
    ],
)
def test_a_wrong_provider_is_refused_with_its_name(
    tmp_path: Path, field: str, value: object, place: str
) -> None:
    error = refused(tmp_path, changed("providers", "far", field, value=value))
    assert f"\n  {place}: " in error.detail


def test_a_provider_needs_an_address(tmp_path: Path) -> None:
    error = refused(tmp_path, changed("providers", "here", "base_url", drop=True))
    assert "\n  provider here: base_url or base_url_env is needed" in error.detail


def test_all_faults_are_told_at_once_up_to_a_bound(tmp_path: Path) -> None:
    models = {f"m{i}": {"provider": "here"} for i in range(FAULTS_TOLD_MAX)}
    error = refused(tmp_path, {**VALID, "models": models})
    assert len(error.faults) == FAULTS_TOLD_MAX
    assert len(error.detail.splitlines()) == FAULTS_TOLD_MAX + 1


@pytest.mark.parametrize("content", ["[]", "just words", "models: 3", "{7: {}}", "extra: {}"])
def test_a_file_of_another_shape_is_refused(tmp_path: Path, content: str) -> None:
    assert "is not valid:" in refused(tmp_path, content).detail


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f"models:\n  a: {CANARY}\n  a: 2\n", "line 3: a key stands twice"),
        (f"models: {{x: {CANARY}\n", "line 2: this is no valid YAML"),
        (f"models: !!python/name:{CANARY} x", "line 1: this is no valid YAML"),
        ("models: 2026-99-99", "this is no valid YAML"),
        (b"models: \xff", "this is no valid YAML"),
        ("? [1]\n: 2", "this is no valid YAML"),
        ("models: " + "[" * 20_000, "this is no valid YAML"),
    ],
)
def test_what_is_no_yaml_is_refused_without_its_text(
    tmp_path: Path, content: str | bytes, words: str
) -> None:
    assert words in refused(tmp_path, content).detail


def test_a_file_that_is_too_large_or_not_there_is_refused(tmp_path: Path) -> None:
    assert "is larger than" in refused(tmp_path, "#" * (FILE_BYTES_MAX + 1)).detail
    assert loaded(tmp_path, "#" * FILE_BYTES_MAX) == Catalog()
    with pytest.raises(ModelsInvalid, match="can not be read \\(FileNotFoundError\\)"):
        load_catalog(tmp_path / "none.yaml", variables())


# --- the file that is shipped ---------------------------------------------------------------------


def everything_set(name: str) -> SecretStr | None:
    return SecretStr("https://models.example.com" if name.endswith("_URL") else "secret")


def test_the_shipped_file_is_valid_and_calls_nobody_by_itself() -> None:
    catalog = load_catalog(SHIPPED, variables())

    assert {found.kind for found in catalog.providers.values()} == {
        "openai",
        "anthropic",
        "ollama",
        "yandex",
    }
    assert all(found.unavailable for found in catalog.providers.values())


def test_the_shipped_file_serves_every_role_once_its_variables_are_set() -> None:
    catalog = load_catalog(SHIPPED, everything_set)

    assert not any(found.unavailable for found in catalog.providers.values())
    served = {role for model in catalog.models.values() for role in model.roles}
    assert served == set(ModelRole)
    for model in catalog.models.values():
        assert "{" not in model.vendor_name
        is_text = model.roles != (ModelRole.EMBEDDING,)
        assert (model.output_tokens_max > 0) == is_text, model.name


# --- money and tokens -----------------------------------------------------------------------------


def prices(**given: str) -> Prices:
    return Prices(**{f"{name}_usd_per_mtok": Decimal(value) for name, value in given.items()})


def test_cached_tokens_have_a_price_of_their_own_or_that_of_input() -> None:
    usage = Usage(tokens_in=1_000, tokens_out=10, tokens_cached=400)
    assert prices(input="2", output="8").cost_usd(usage) == Decimal("0.00208")
    assert prices(input="2", output="8", cached="0.5").cost_usd(usage) == Decimal("0.00148")


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_a_cost_is_exact(tokens_in: int, tokens_out: int) -> None:
    cost = prices(input="0.000000001", output="999999.999999999").cost_usd(
        Usage(tokens_in, tokens_out)
    )
    assert cost * 10**15 == tokens_in + tokens_out * 999999999999999


@given(st.lists(st.text(max_size=40), max_size=6), st.sampled_from([1.0, 2.5, 3.0, 4.0]))
def test_characters_are_rounded_up_over_all_texts(texts: list[str], per_token: float) -> None:
    count = CharacterCounter(per_token)(texts)
    chars = len("".join(texts))
    assert chars <= count * per_token < chars + per_token


@given(st.integers(0, 10**7), st.integers(0, 10**6))
def test_a_projection_is_both_and_five_percent_rounded_up(prompt: int, output: int) -> None:
    found = projected(prompt, output)
    exact = Decimal(prompt + output) * Decimal("1.05")
    assert exact <= found < exact + 1


def test_all_that_is_sent_is_counted() -> None:
    messages = [
        Message(ChatRole.USER, "ask"),
        Message(ChatRole.ASSISTANT, "", (ToolCall("1", "look_up", '{"q":1}'),)),
        Message(ChatRole.TOOL, "found", call_id="1"),
    ]
    tools = [Tool("look_up", "Looks up.", {"type": "object"})]
    schema: Mapping[str, Any] = {"type": "string"}

    assert texts_of(messages, tools, schema) == (
        "ask",
        "",
        "look_up",
        '{"q":1}',
        "found",
        "look_up",
        "Looks up.",
        '{"type":"object"}',
        '{"type":"string"}',
    )
    assert texts_of(messages[:1]) == ("ask",)


# --- tokenizer files ------------------------------------------------------------------------------


def with_tokenizer(folder: Path, make: Callable[[Path], object]) -> dict[str, Any]:
    make(folder / "small.json")
    return changed("models", "small", "tokenizer", value={"file": "small.json"})


@pytest.mark.skipif(HAS_TOKENIZERS, reason="tokenizers is installed")
def test_a_tokenizer_file_needs_its_package(tmp_path: Path) -> None:
    content = with_tokenizer(tmp_path, lambda path: path.touch())
    detail = refused(tmp_path, content).detail
    assert "model small, tokenizer.file: a tokenizer file needs the package tokenizers" in detail


@pytest.mark.skipif(not HAS_TOKENIZERS, reason="tokenizers is not installed")
def test_a_tokenizer_file_counts_exactly_and_is_never_cut_short(tmp_path: Path) -> None:
    library = importlib.import_module("tokenizers")

    def make(path: Path) -> None:
        words = library.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
        tokenizer = library.Tokenizer(words)
        tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
        tokenizer.enable_truncation(3)
        tokenizer.enable_padding(length=8)
        tokenizer.save(str(path))

    content = with_tokenizer(tmp_path, make)
    assert loaded(tmp_path, content).counters["small"](["a b a b a", "c", ""]) == 6

    content = with_tokenizer(tmp_path, lambda path: path.write_text(CANARY))
    assert "the tokenizer file can not be read" in refused(tmp_path, content).detail


@pytest.mark.parametrize("key", ["sk-…", "sk-...", "xxx", "<your key>", "changeme", "your-api-key"])
def test_a_key_as_examples_have_it_is_none(key: str, tmp_path: Path) -> None:
    far = loaded(tmp_path, FAR_KEY=key, FAR_PROJECT="f-1").providers["far"]
    assert far.unavailable == "FAR_KEY is a placeholder"


def test_models_can_be_switched_off_whatever_is_configured(tmp_path: Path) -> None:
    given = variables(FAR_KEY="k", FAR_PROJECT="f-1")
    catalog = load_catalog(written(tmp_path, VALID), given, is_enabled=False)
    assert {found.unavailable for found in catalog.providers.values()} == {SWITCHED_OFF}
