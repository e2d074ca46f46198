"""Where the requests of a capability go: the rules for url, headers and secrets of a config.

Shared by the kinds whose far side speaks HTTP. A secret is named by a registration and looked up
here, for the hosts that the operator declared; its value leaves only in a `Target`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from app.adapters.capabilities.egress import EgressPolicy, EgressRefused
from app.adapters.capabilities.secrets import SecretRefused, SecretStore
from app.adapters.capabilities.text_lines import word_set
from app.domain.capability import Capability
from app.domain.errors import Fault
from app.ports import CallFailed

HEADERS_MAX = 30
TARGET_KEYS = frozenset({"url", "headers", "secret_headers"})

_HEADER_NAME = re.compile(r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}$")
_HEADER_VALUE = re.compile(r"^[\x20-\x7e\t]{0,4000}$")
# Set by the adapters or by the transport; a registration must not take them over.
_OWN_HEADERS = word_set(
    """accept accept-encoding connection content-encoding content-length content-type expect host
    idempotency-key keep-alive proxy-authorization proxy-connection te traceparent tracestate
    trailer transfer-encoding upgrade"""
)

ConfigFault = tuple[str, str, str]
"""Code, message and pointer in the config of something that is wrong."""


@dataclass(frozen=True, slots=True)
class Target:
    """A checked config: where to send, with which headers; `secrets` are the values among them."""

    url: httpx.URL
    headers: dict[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)


def is_own_header(name: str) -> bool:
    """Whether a header, in lower case, is set by every adapter that speaks HTTP."""
    return name in _OWN_HEADERS


class TargetRules:
    """What the configs of one kind may say about their far side.

    `keys` are all that a config may have. `is_own` tells which header names, in lower case, the
    kind sets itself.
    """

    def __init__(
        self,
        kind: str,
        policy: EgressPolicy,
        secrets: SecretStore,
        *,
        keys: frozenset[str] = TARGET_KEYS,
        is_own: Callable[[str], bool] = is_own_header,
    ) -> None:
        self._kind = kind
        self._keys = keys
        self._policy = policy
        self._secrets = secrets
        self._is_own = is_own

    def faults(self, config: dict[str, Any]) -> Iterator[ConfigFault]:
        """Keys that do not belong there, and what is wrong with url, headers and secrets.

        Names are not resolved: what they stand for is judged at every connection.
        """
        yield from unexpected_keys(self._kind, config, self._keys)
        address = config.get("url")
        if not isinstance(address, str):
            yield "config_invalid", f"an {self._kind} capability needs a url", "/url"
            return
        try:
            url = self._policy.check_url(address)
        except EgressRefused as error:
            yield error.code, error.message, "/url"
            return
        yield from self._header_faults(config, "headers")
        yield from self._header_faults(config, "secret_headers")
        yield from self._secret_faults(config, url)

    def target(self, config: dict[str, Any]) -> Target:
        """The target of a config that was checked once; settings may have changed since.

        Raises `CallFailed` `egress_refused` or `capability_misconfigured`.
        """
        check_again(self.faults(config))
        url = self._policy.check_url(config["url"])
        headers = dict(config.get("headers", {}))
        values = {
            header: self._secrets.value_for(name, url)
            for header, name in config.get("secret_headers", {}).items()
        }
        return Target(url, {**headers, **values}, tuple(values.values()))

    def _header_faults(self, config: dict[str, Any], part: str) -> Iterator[ConfigFault]:
        headers = config.get(part, {})
        if not isinstance(headers, dict) or len(headers) > HEADERS_MAX:
            text = f"{part} must be an object of at most {HEADERS_MAX} names"
            yield "config_invalid", text, f"/{part}"
            return
        for name, value in headers.items():
            pointer = f"/{part}/{name}"
            if not _HEADER_NAME.match(name) or self._is_own(name.lower()):
                yield "config_invalid", f"header {name!r} can not be set", pointer
            elif not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
                yield "config_invalid", f"header {name!r} needs a printable ASCII text", pointer

    def _secret_faults(self, config: dict[str, Any], url: httpx.URL) -> Iterator[ConfigFault]:
        secrets = config.get("secret_headers", {})
        if not isinstance(secrets, dict) or not secrets:
            return
        if url.scheme != "https" and not self._policy.allows_host(url.raw_host.decode("ascii")):
            text = "secrets are sent over https only"
            yield "secret_refused", text, "/secret_headers"
        plain = config.get("headers")
        both = {name.lower() for name in plain} if isinstance(plain, dict) else set()
        for header, name in secrets.items():
            pointer = f"/secret_headers/{header}"
            if header.lower() in both:
                yield "config_invalid", f"header {header!r} is given twice", pointer
            try:
                self._secrets.value_for(str(name), url)
            except SecretRefused as error:
                yield "secret_refused", str(error), pointer


def unexpected_keys(
    kind: str, config: dict[str, Any], allowed: frozenset[str]
) -> Iterator[ConfigFault]:
    """A fault for every key of a config that the kind does not know."""
    for name in config.keys() - allowed:
        yield "config_unexpected", f"an {kind} capability takes no {name!r}", f"/{name}"


def as_faults(found: Iterator[ConfigFault], capability: Capability) -> list[Fault]:
    """The faults as `CapabilityAdapter.check` returns them, with pointers into `/config`."""
    return [
        Fault(code, message, "/config" + pointer, capability_id=capability.capability_id)
        for code, message, pointer in found
    ]


def check_again(found: Iterator[ConfigFault]) -> None:
    """Before a call: raises `CallFailed` for the first fault, and nothing was called."""
    for code, message, _pointer in found:
        shown = "egress_refused" if code in EgressRefused.CODES else "capability_misconfigured"
        raise CallFailed(shown, message, retryable=False, target_failed=None)


def host_scope(capability: Capability, tenant_id: str) -> str:
    """`tool::host[:port]`; with the tenant where the credentials are the tenant's own."""
    config = capability.registration.config
    url = httpx.URL(config["url"])
    scope = f"{capability.capability_id}::{url.netloc.decode('ascii')}"
    return f"{scope}::{tenant_id}" if config.get("headers") else scope
