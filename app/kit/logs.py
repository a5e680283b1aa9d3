"""The log: JSON, one object a line, on standard error; secrets never get into it."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import structlog
from structlog.types import EventDict, Processor

_SECRET_KEYS = re.compile(r"authorization|cookie|token|password|secret|api_key", re.IGNORECASE)
_SECRET_VALUES = re.compile(r"\b(sct_|hf_)\w+|\bwhsec_[\w+/=]+|(?<=://)[^/@\s]+(?=@)|\bBearer\s+\S+")
_HIDDEN = "[hidden]"


class _StandardError(logging.Handler):
    """Writes to whatever is standard error now, not to what it was when logging was set up."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def configure(level: int = logging.INFO) -> None:
    """Set up the log of a process: structlog's lines, and those of the standard library below them.

    A root logger that already has handlers keeps them.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        redact,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()],
    )
    root = logging.getLogger()
    root.setLevel(level)
    if not root.handlers:
        handler = _StandardError()
        handler.setFormatter(formatter)
        root.addHandler(handler)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        # Every request has its line already, with its id.
        logging.getLogger(name).propagate = name != "uvicorn.access"


def redact(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Hide values whose key sounds like a secret, and what looks like one inside any text."""
    for key, value in event.items():
        if _SECRET_KEYS.search(key):
            event[key] = _HIDDEN
        elif isinstance(value, str):
            event[key] = _SECRET_VALUES.sub(_HIDDEN, value)
    return event
