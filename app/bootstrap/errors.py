"""What keeps a process from starting."""

from __future__ import annotations

from app.domain.errors import FlexrunError


class NotReady(FlexrunError):
    """The service can not start; the message says what to do."""

    code = "not_ready"
