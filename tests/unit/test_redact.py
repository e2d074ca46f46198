"""What is shown of values that hold secrets."""

from __future__ import annotations

from typing import Any

import pytest

from app.kit.redact import REDACTED, redact


@pytest.mark.parametrize(
    "key",
    [
        *("token", "access_token", "X-Auth-Token", "secret", "client_secret", "apikey", "api-key"),
        *("API_KEY", "Authorization", "Proxy-Authorization", "password", "passwd", "passphrase"),
        *("bearer", "credentials", "Set-Cookie", "private-key", "access_key_id"),
    ],
)
def test_values_of_secret_keys_go(key: str) -> None:
    assert redact({key: "hunter2"}) == {key: REDACTED}
    assert redact([{"a": {key: ["hunter2"]}}]) == [{"a": {key: [REDACTED]}}]


def test_a_secret_object_keeps_its_form() -> None:
    headers = {"Authorization": "name of a secret", "x": {"y": [1, True, None]}}
    assert redact({"secret_headers": headers}) == {
        "secret_headers": {"Authorization": REDACTED, "x": {"y": [REDACTED, REDACTED, None]}}
    }


def test_counts_of_tokens_stay() -> None:
    counts = {"tokens": 20_000, "max_tokens": 1.5, "usage": {"prompt_tokens": 3}}
    assert redact(counts) == counts
    assert redact({"tokens": ["hunter2"], "password": 1234}) == {
        "tokens": [REDACTED],
        "password": REDACTED,
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:hunter2@db/x", f"postgresql://{REDACTED}@db/x"),
        ("see http://hunter2@a.example, ok?", f"see http://{REDACTED}@a.example, ok?"),
        ("mail me@a.example", "mail me@a.example"),
        ("https://a.example/@me", "https://a.example/@me"),
    ],
)
def test_passwords_in_addresses_go(text: str, shown: str) -> None:
    assert redact({"url": text}) == {"url": shown}


def test_the_original_is_not_changed() -> None:
    value: dict[str, Any] = {"secret": {"a": ["b"]}, "c": (1, "d")}
    redact(value)
    assert value == {"secret": {"a": ["b"]}, "c": (1, "d")}
