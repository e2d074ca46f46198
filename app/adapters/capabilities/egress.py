"""The egress guard: where tools may connect to, decided on addresses and not on names.

A host is resolved once, all its addresses are judged, and the connection goes to a judged address
while name, Host header, SNI and certificate stay those of the URL. So a name that changes its
address between check and use (DNS rebinding) gains nothing, and however a private address is
spelled in a URL, it is the resolved address that is refused.

`EgressPolicy` decides and does no I/O but DNS; `egress_transport.py` connects.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import httpx

URL_CHARS_MAX = 4_000
RESOLVE_TIMEOUT_S = 5.0

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolver = Callable[[str, int], Awaitable[list[str]]]


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(net) for net in text.split())


# IANA special-purpose registries, written out because `ipaddress.is_global` differs between Python
# releases. 168.63.129.16 is public by its number and a cloud's control channel by its use.
_CLOSED_V4 = _networks(
    """0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 168.63.129.16/32 169.254.0.0/16
    172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24
    192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4
    240.0.0.0/4"""
)
# Of IPv6 only global unicast is open, and in it no tunnels (Teredo, 6to4) and no documentation.
_OPEN_V6 = IPv6Network("2000::/3")
_CLOSED_V6 = _networks("2001::/23 2001:db8::/32 2002::/16 3fff::/20 2620:4f:8000::/48")
# Addresses that carry an IPv4 address in their last 32 bits and stand for it.
_CARRIERS_V6 = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"))

# Ports of protocols that a crafted HTTP request could be mistaken for.
CLOSED_PORTS = frozenset(
    int(port)
    for port in re.findall(
        r"\d+",
        """0 1 7 9 11 13 17 19 20 21 22 23 25 37 42 43 53 69 79 110 111 119 123 135 137 139 143 161
        179 389 427 465 512 513 514 515 540 548 554 587 601 636 993 995 1719 1720 1723 2049 3306
        3659 4045 4190 5060 5061 5432 6000 6379 6566 6665 6666 6667 6668 6669 6697 10080 11211
        27017""",
    )
)

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,62}[a-z0-9_])?"
_HOST_NAME = re.compile(rf"^(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*$")
_NUMBER_LABEL = re.compile(r"^(?:\d+|0x[0-9a-f]*)$")
_CONTROL = re.compile(r"[\x00-\x20\x7f\\]")


class EgressRefused(Exception):
    """The policy forbids this target; the message never holds an address.

    `code` is one of `CODES`.
    """

    CODES = frozenset(
        {
            "url_invalid",
            "scheme_refused",
            "userinfo_refused",
            "host_invalid",
            "port_refused",
            "address_refused",
        }
    )

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ResolveFailed(Exception):
    """The name has no address at this time; nothing was sent."""


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host by the system's resolver. Raises `ResolveFailed`."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError) as error:
        raise ResolveFailed(f"the host {host!r} could not be resolved") from error
    return list(dict.fromkeys(str(info[4][0]) for info in found))


class EgressPolicy:
    """Public addresses over http and https, plus what the operator allows.

    `allow` holds CIDRs or addresses ("10.1.0.0/16", "::1"), host names ("tools.internal"), and
    suffixes with a leading dot (".svc.cluster.local"). An allowed name may have any address; an
    allowed network may be reached by any name. Raises ValueError for an entry that is neither.
    """

    def __init__(self, allow: Iterable[str] = (), *, resolver: Resolver = resolve) -> None:
        self._resolver = resolver
        self._networks: list[Network] = []
        self._names: set[str] = set()
        self._suffixes: tuple[str, ...] = ()
        for entry in (entry.strip().lower().rstrip(".") for entry in allow):
            if not entry:
                continue
            if network := _network(entry):
                self._networks.append(network)
            elif entry.startswith(".") and _HOST_NAME.match(entry[1:]):
                self._suffixes += (entry,)
            elif _HOST_NAME.match(entry) and not _ends_in_number(entry):
                self._names.add(entry)
            else:
                raise ValueError(f"egress allow: {entry!r} is no CIDR, address or host name")

    def check_url(self, url: str) -> httpx.URL:
        """The parsed URL when it may be asked for at all; raises `EgressRefused`.

        Literal addresses are judged here already, names when they are resolved.
        """
        if len(url) > URL_CHARS_MAX or _CONTROL.search(url):
            raise EgressRefused("url_invalid", "the URL is too long or has forbidden characters")
        try:
            parsed = httpx.URL(url)
            _ = parsed.host  # Decodes an internationalised name, and may find that it is none.
        except (httpx.InvalidURL, ValueError) as error:
            raise EgressRefused("url_invalid", "the URL can not be parsed") from error
        if parsed.scheme not in ("http", "https"):
            raise EgressRefused("scheme_refused", "only http and https URLs are allowed")
        if parsed.userinfo or "@" in parsed.netloc.decode("ascii"):
            raise EgressRefused("userinfo_refused", "a URL must not carry a user or a password")
        self._check_host(parsed.raw_host.decode("ascii"), parsed.port or _default_port(parsed))
        return parsed

    def allows_host(self, host: str) -> bool:
        """Whether the operator named this host or literal address, by name or by network."""
        host = host.lower().rstrip(".")
        if host in self._names or host.endswith(self._suffixes or ("\0",)):
            return True
        address = _literal(host)
        return address is not None and self._is_allowed(address)

    async def addresses(self, host: str, port: int) -> list[str]:
        """The addresses to connect to, in the resolver's order; all of them have been judged.

        Raises `EgressRefused` when any of them is closed, `ResolveFailed` when there is none.
        """
        self._check_host(host, port)
        bare = host.strip("[]").rstrip(".")
        found = [bare] if _literal(bare) else await self._resolver(bare, port)
        if not found:
            raise ResolveFailed(f"the host {bare!r} has no address")
        if not self.allows_host(bare):
            for text in found:
                self._judge(text)
        return found

    def _check_host(self, host: str, port: int) -> None:
        bare = host.strip("[]").rstrip(".").lower()
        if port in CLOSED_PORTS or not 0 < port < 65_536:
            raise EgressRefused("port_refused", f"port {port} is closed to tools")
        if _literal(bare) is not None:
            if not self.allows_host(bare):
                self._judge(bare)
            return
        # 127.1, 0x7f.1 and 2130706433 are addresses to a resolver and names to a reader.
        if not _HOST_NAME.match(bare) or _ends_in_number(bare):
            raise EgressRefused("host_invalid", "the URL's host is not a plain name or address")

    def _judge(self, text: str) -> None:
        address = _literal(text)
        if address is None or not (is_public(address) or self._is_allowed(address)):
            raise EgressRefused("address_refused", "the host is on a private or reserved network")

    def _is_allowed(self, address: Address) -> bool:
        seen = (address, _carried(address))
        return any(one in network for network in self._networks for one in seen if one is not None)


def is_public(address: Address) -> bool:
    """Whether an address belongs to the open internet; carriers count as what they carry."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _CLOSED_V4)
    carried = _carried(address)
    if carried is not None:
        return is_public(carried)
    return address in _OPEN_V6 and not any(address in network for network in _CLOSED_V6)


def _carried(address: Address) -> IPv4Address | None:
    if isinstance(address, IPv6Address) and any(address in net for net in _CARRIERS_V6):
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return None


def _literal(host: str) -> Address | None:
    """The address that the host spells out in full; zone ids are not accepted."""
    if "%" in host:
        return None
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _network(entry: str) -> Network | None:
    try:
        return ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        return None


def _ends_in_number(host: str) -> bool:
    return bool(_NUMBER_LABEL.match(host.rpartition(".")[2]))


def _default_port(url: httpx.URL) -> int:
    return 443 if url.scheme == "https" else 80
