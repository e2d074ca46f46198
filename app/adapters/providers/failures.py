"""What an exchange with a provider means when it gave no answer: one place that makes the errors.

| outcome | code | retryable | counted by its breaker |
|---|---|---|---|
| over its time, no connection within 10 s | Python's `TimeoutError` | | |
| no connection (DNS, refused, TLS), reset, answer cut off | provider_unreachable | yes | yes |
| 429 | provider_busy | yes | yes |
| 408, 5xx | provider_failed | yes | yes |
| other statuses (3xx too: redirects are not followed) | provider_refused | no | no |
| 2xx that can not be read | provider_garbage | yes | no |

Vendors can also fail in the middle of a stream, whose status was 200: then the vendor's own word
for the error decides. No text of a request or an answer gets into a message, but for that word;
and not even that where it repeats a part of the request.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import httpx

from app.domain.chat import LlmUnavailableError
from app.kit.retry_after import retry_after_s

ECHO_CHARS_MIN = 6
"""Shorter values of headers are no secrets, and stand in many words."""

_WORD = re.compile(r"[a-z0-9_.-]{1,64}")
# The statuses that OpenAI and Anthropic document for the errors which they also send in streams.
_STATUS_OF_WORD = {
    "invalid_request_error": 400,
    "invalid_prompt": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
}


class Garbage(ValueError):
    """A 2xx answer that can not be read. The text ends the sentence "the answer …"."""


class BrokenOff(Exception):
    """The vendor says in its answer that it failed; `word` is its name for that, or ""."""

    def __init__(self, word: str) -> None:
        super().__init__(word)
        self.word = word


def failure(
    name: str, error: TimeoutError | httpx.HTTPError | Garbage | BrokenOff, request: httpx.Request
) -> TimeoutError | LlmUnavailableError:
    """What an error of this exchange with the provider `name` means. It is not kept as a cause."""
    match error:
        case TimeoutError() | httpx.TimeoutException():
            return TimeoutError(f"{name} gave no whole answer in time")
        case httpx.HTTPError():
            is_unmade = isinstance(error, httpx.ConnectError)
            what = "no connection could be made" if is_unmade else "the connection broke off"
            return LlmUnavailableError(
                "provider_unreachable", f"{name}: {what}", retryable=True, target_failed=True
            )
        case Garbage():
            text = f"{name}: the answer {error}"
            return LlmUnavailableError(
                "provider_garbage", text, retryable=True, target_failed=False
            )
    shown = "" if is_echo(error.word, request) else error.word
    text = f"{name}: the answer is an error" + (f": {shown}" if shown else "")
    return _of_status(_STATUS_OF_WORD.get(error.word, 500), text, None, None)


def status_failure(name: str, status: int, retry_after: str, word: str) -> LlmUnavailableError:
    """What a status outside 2xx means; `retry_after` is the header, `word` the vendor's or ""."""
    text = f"{name} answered {status}" + (f": {word}" if word else "")
    if 300 <= status < 400:
        text = f"{name} answered {status}: redirects are not followed"
    wish = retry_after_s(retry_after, datetime.now(UTC))
    return _of_status(status, text, status, wish)


def _of_status(
    kind: int, text: str, status: int | None, retry_after: float | None
) -> LlmUnavailableError:
    is_passing = kind in (408, 429) or kind >= 500
    code = "provider_failed" if is_passing else "provider_refused"
    return LlmUnavailableError(
        "provider_busy" if kind == 429 else code,
        text,
        retryable=is_passing,
        target_failed=is_passing,
        status=status,
        retry_after_s=retry_after,
    )


def is_echo(word: str, request: httpx.Request) -> bool:
    """Whether the vendor's word is, holds or is a part of something that was sent.

    Some servers name an error by what they did not like: a key, or a prompt of one word. Case is
    nothing, and of a header with a scheme ("Bearer …") the credential alone counts, too.
    """
    values = [value.decode("latin-1").lower() for _, value in request.headers.raw]
    credentials = [value.rpartition(" ")[2] for value in values]
    is_held = any(len(sent) >= ECHO_CHARS_MIN and sent in word for sent in (*values, *credentials))
    sent_texts = (*values, request.content.decode().lower())
    return is_held or any(word in sent for sent in sent_texts)


def error_word(error: Any) -> str:
    """The vendor's short name for an error `{code, type, …}`; "" where there is none.

    Only what looks like a name is taken, so that no sentence about the prompt gets through.
    """
    if not isinstance(error, dict):
        return ""
    for word in (error.get("code"), error.get("type")):
        if isinstance(word, str) and _WORD.fullmatch(word):
            return word
    return ""
