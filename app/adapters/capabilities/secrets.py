"""The operator's secrets: named by registrations, sent to declared hosts, shown to nobody."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

HIDDEN = "[secret]"
_SHORT = 6


@dataclass(frozen=True, slots=True)
class Secret:
    """A value and the hosts it may be sent to, each "host" or "host:port"; never printed."""

    value: str = field(repr=False)
    hosts: frozenset[str]


class SecretRefused(Exception):
    """No such secret, or not for this host: the two are not told apart to whoever asks."""


class SecretStore:
    """Secrets by name. The only readers are the adapters that send them."""

    def __init__(self, secrets: Mapping[str, tuple[str, Iterable[str]]] | None = None) -> None:
        """`secrets` maps a name to its value and its hosts. Raises ValueError for a value that can
        not stand in a header; the message has the name, never the value."""
        self._secrets: dict[str, Secret] = {}
        for name, (value, hosts) in (secrets or {}).items():
            if not value or not value.isascii() or not value.isprintable():
                raise ValueError(f"secret {name!r} can not be sent as a header value")
            self._secrets[name] = Secret(value, frozenset(host.lower() for host in hosts))

    def __repr__(self) -> str:
        return f"SecretStore({sorted(self._secrets)})"

    def hidden_in(self, value: Any) -> Any:
        """A JSON value in which no secret of the operator stands, wherever it came from."""
        return redacted(value, [secret.value for secret in self._secrets.values()])

    def value_for(self, name: str, url: httpx.URL) -> str:
        """The secret's value when it may be sent to this URL; raises `SecretRefused`."""
        secret = self._secrets.get(name)
        host = url.raw_host.decode("ascii").lower().rstrip(".")
        port = url.port or (443 if url.scheme == "https" else 80)
        if secret is None or secret.hosts.isdisjoint((host, f"{host}:{port}")):
            raise SecretRefused(f"no secret {name!r} may be sent to this host")
        return secret.value


def redacted(value: Any, secrets: Iterable[str]) -> Any:
    """A JSON value in which every occurrence of a secret, or of its last word, is hidden.

    For what a far side sends back: a server that echoes its request must not put the credential
    into a journal. Encoded forms (base64 of a part, split strings) are not recognised.
    """
    needles = set()
    for secret in secrets:
        needles.add(secret)
        last = secret.rsplit(" ", 1)[-1]
        if len(last) >= _SHORT:
            needles.add(last)
    ordered = sorted(needles, key=lambda needle: (-len(needle), needle))
    return _hide(value, ordered) if ordered else value


def _hide(value: Any, needles: list[str]) -> Any:
    if isinstance(value, str):
        for needle in needles:
            value = value.replace(needle, HIDDEN)
        return value
    if isinstance(value, list):
        return [_hide(part, needles) for part in value]
    if isinstance(value, dict):
        return {_hide(key, needles): _hide(part, needles) for key, part in value.items()}
    return value
