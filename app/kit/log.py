"""Log lines as JSON, one a line, with control characters escaped by the encoder."""

from __future__ import annotations

import logging
import sys
import traceback

import orjson

from app.kit.clock import now_ms
from app.kit.rfc3339 import rfc3339


class JsonFormatter(logging.Formatter):
    """`{ts, level, logger, message}`, the `fields` of the record where it has some, and, for
    exceptions, where it happened: never its text.

    The text of an exception can hold what a caller sent; the type and the place do not.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": rfc3339(now_ms()),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            frames = traceback.extract_tb(record.exc_info[2])
            line["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-8:]]
        return orjson.dumps(line, default=str).decode()


def configure(level: str) -> None:
    """Send all log lines to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("httpx", "httpcore"):  # their tracing quotes what others answered
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("langfuse").setLevel(logging.WARNING)
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)
