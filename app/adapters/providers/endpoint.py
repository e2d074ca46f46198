"""Where a provider of models is reached, and with which key: one entry of the operator's file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import httpx
from pydantic import SecretStr

ProviderKind = Literal["openai", "anthropic", "ollama", "yandex"]
OpenAiApi = Literal["chat", "responses"]

_KEY = re.compile(r"[\x21-\x7e]+")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
_HEADER_VALUE = re.compile(r"[\x20-\x7e\t]{0,4000}")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One provider, as `make_provider` takes it.

    `name` is what people call it, also in errors. `base_url` is what the vendor's own client takes:
    with `/v1` for openai and yandex, without for anthropic and ollama. `headers` are sent with
    every request and win over ours. `project` is the folder id of yandex, `api` the dialect of
    openai and yandex; the other kinds do not look at them.

    Raises `ValueError`, which names the provider and the field, never a value.
    """

    name: str
    kind: ProviderKind
    base_url: str = field(repr=False)
    key: SecretStr | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    project: str | None = None
    api: OpenAiApi = "chat"

    def __post_init__(self) -> None:
        if not _is_base_url(self.base_url):
            raise ValueError(
                f"the base_url of provider {self.name!r} must be http:// or https:// with a host, "
                "and hold no user, query or fragment"
            )
        # What HTTP can not carry would come back in the error of a library, with its value.
        if self.key is not None and not _KEY.fullmatch(self.key.get_secret_value()):
            raise ValueError(
                f"the key of provider {self.name!r} must be printable ASCII, no blanks"
            )
        if self.project is not None and not _KEY.fullmatch(self.project):
            raise ValueError(
                f"the project of provider {self.name!r} must be printable ASCII, no blanks"
            )
        for name, value in self.headers.items():
            if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
                raise ValueError(f"provider {self.name!r} has a header that HTTP can not carry")


def _is_base_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    is_plain = not (url.userinfo or url.query or url.fragment)
    return url.scheme in ("http", "https") and bool(url.host) and is_plain
