"""
Where log events go: through structlog as the app configured it, else through stdlib logging where the app has set up
handlers, else as one JSON line to stderr. Asked anew each time: an app may configure its logging late.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import structlog

from . import _clock

logger = logging.getLogger("aftertask")
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_second = (-1, "")
_DIGITS = tuple(f"{number:03}" for number in range(1000))  # made beforehand: a format takes four times as long


def iso(timestamp: float) -> str:
    """Seconds since the epoch as ISO 8601, UTC, with microseconds; the part up to the second is made once a second."""
    global _second
    now = int(timestamp)
    second, text = _second
    if now != second:
        text = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(now))
        _second = now, text  # as one: another thread must not see the parts of two seconds
    micros = int((timestamp - now) * 1e6)
    return f"{text}{_DIGITS[micros // 1000]}{_DIGITS[micros % 1000]}Z"


def emit(level: str, event: str, *, timestamp: float | None = None, **keys: Any) -> Exception | None:
    """
    Log one event; keys that are None are left out.

    Returns:
        What the app's own logging raised, which comes no further than here: the line goes to stderr then. Else None.
    """
    keys = {key: value for key, value in keys.items() if value is not None}
    at = iso(_clock.timestamp() if timestamp is None else timestamp)
    failed: Exception | None = None
    try:
        if structlog.is_configured():
            getattr(structlog.get_logger("aftertask"), level)(event, timestamp=at, **keys)
            return None
        if _handled():
            if logger.isEnabledFor(LEVELS[level]):
                logger.log(LEVELS[level], event, extra=_safe({"timestamp": at, **keys}))
            return None
    except Exception as error:
        failed = error
        keys["logging_error"] = type(error).__name__
    if level != "debug":
        write(json.dumps({"event": event, "level": level, "timestamp": at, **keys}, default=str) + "\n")
    return failed


def to_stderr() -> bool:
    """Whether nothing is configured, so that we write the lines ourselves."""
    return not structlog.is_configured() and not _handled()


def _handled() -> bool:
    # As logger.hasHandlers() says, without its loop where there is nothing between us and the root.
    parent = logger.parent
    return bool(
        logger.handlers
        or (
            logger.propagate
            and parent is not None
            and (parent.handlers if parent.parent is None else parent.hasHandlers())
        )
    )


def write(line: str) -> None:
    """One whole line to stderr; a closed or broken stderr is nobody's business but its owner's."""
    stream = sys.stderr
    try:
        if stream is sys.__stderr__:
            # At once and as one piece, past the stream's layers: lines of several workers do not mix.
            os.write(2, line.encode())
        elif stream is not None:
            stream.write(line)
    except (OSError, ValueError):
        pass


# What logging keeps for itself in a record and refuses as an extra.
_RESERVED = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


def _safe(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{key}_" if key in _RESERVED else key: value for key, value in keys.items()}
