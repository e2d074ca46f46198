"""Taking secrets out of a value before it is shown. What is stored is never changed.

Secrets are recognised by the key that they stand under, and by the form of an address with a
password in it. This is the second wall: the first is that secrets are named, not given.
"""

from __future__ import annotations

import re
from typing import Any

REDACTED = "[redacted]"

_SECRET = re.compile(
    r"secret|api_?key|access_?key|private_?key|authorization|passw(?:or)?d|passphrase"
    r"|bearer|credential|cookie",
    re.IGNORECASE,
)
# Numbers under such keys are counts: max_tokens, prompt_tokens.
_TOKEN = re.compile(r"token", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/\s@]+@")


def redact(value: Any) -> Any:
    """A copy of a JSON value in which the values of secret keys are `[redacted]`.

    Under such a key objects and arrays keep their form and lose their leaves; null stays null. A
    user and password in an address go, wherever the address stands.
    """
    if isinstance(value, dict):
        return {key: _under(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, str) and "@" in value:
        return _USERINFO.sub(f"{REDACTED}@", value)
    return value


def _under(key: str, value: Any) -> Any:
    plain = key.replace("-", "_")
    if _SECRET.search(plain):
        return _blank(value)
    if _TOKEN.search(plain):
        return _blank(value, keeps_numbers=True)
    return redact(value)


def _blank(value: Any, *, keeps_numbers: bool = False) -> Any:
    if isinstance(value, dict):
        return {key: _blank(item, keeps_numbers=keeps_numbers) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_blank(item, keeps_numbers=keeps_numbers) for item in value]
    if value is None or (keeps_numbers and isinstance(value, int | float)):
        return value
    return REDACTED
