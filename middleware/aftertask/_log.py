"""
Where log events go: through structlog as the app configured it; else, if the app set up stdlib logging, as records of
the logger `aftertask`; else through a structlog pipeline of our own as JSON to stderr. An app may configure its logging
late, so this is decided for each line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, cast

import structlog

from . import _clock

Level: TypeAlias = Literal["debug", "info", "warning", "error"]

_NAME = "aftertask"
_NUMBERS: dict[Level, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_stdlib = logging.getLogger(_NAME)

#: A value is cut to this many characters where a message has to show the keys.
_LONGEST_VALUE = 300

_PROBE = "aftertask.probe"
_HIDDEN = (
    "run_id, trace_id and more are attributes of this record, but the app's log format prints none: name them in a "
    "format with aftertask.signals.RunFilter, or use a JSON formatter"
)
_DISABLED = (
    "the app's logging configuration has disabled the logger 'aftertask', so only warnings and errors are logged: set "
    "disable_existing_loggers to False, or name the logger there"
)
_has_explained = False


def log(
    level: Level,
    event: str,
    *,
    message: Callable[[], str] | None = None,
    timestamp: float | None = None,
    exc_info: BaseException | None = None,
    contained: bool = False,
    repeated: bool = False,
    explain: bool = False,
    **keys: object,
) -> Exception | None:
    """
    Log one event; keys that are None are left out, seconds have at most six decimals. Never raises.

    Args:
        level: Its level.
        event: Its name, such as `task.failed`.
        message: Makes the text of a stdlib record, for people; None means the event's name and the keys.
        timestamp: Seconds since the Unix epoch; None means now.
        exc_info: The exception that the line is about. Its text has not been redacted, so it is not handed to the app's
            structlog; a stdlib record prints the key `exception` in place of its traceback, if there is such a key.
        contained: Whether the exception reaches nothing but this line, so that error reporters have to see it here.
        repeated: Whether an identical exception was logged in full already: no handler prints this one, and error
            reporters see it all the same.
        explain: Whether a stdlib record says why it shows no keys, if the app's format prints none of them.
        keys: The line's other keys.

    Returns:
        What the app's own logging raised; the line then goes to stderr with the key `logging_error`. None if it worked.
    """
    keys = {
        key: round(value, 6) if isinstance(value, float) else value for key, value in keys.items() if value is not None
    }
    keys["timestamp"] = _iso(_clock.timestamp() if timestamp is None else timestamp)
    printed = None if repeated else exc_info
    try:
        if _stdlib.disabled and _is_disabled():
            text = _text(event, keys, message)
            _log_although_disabled(level, event, {**keys, "record_text": text, "record_error": printed})
        elif structlog.is_configured():
            getattr(_app.logger(), level)(event, **keys)
        elif _stdlib.hasHandlers():
            text = _text(event, keys, message)
            text = f"{text} [{_HIDDEN}]" if explain and _keys_are_hidden() else text
            getattr(_records, level)(event, record_text=text, record_error=printed, **keys)
        else:
            _write(level, event, keys)
        if contained or printed is not exc_info:
            _report(level, event, {**keys, "record_text": _text(event, keys, message), "record_error": exc_info})
    except Exception as failed:
        _write(level, event, {**keys, "logging_error": type(failed).__name__})
        return failed
    return None


def enabled(level: Level) -> bool:
    """Whether a line of this level is written, as far as that can be found out before it is put together."""
    number = _NUMBERS[level]
    try:
        if _stdlib.disabled and _is_disabled():
            return number >= logging.WARNING
        if structlog.is_configured():
            return _enabled_by_app(number)
        if _stdlib.hasHandlers():
            return _stdlib.isEnabledFor(number)
    except Exception:
        return True  # `log` meets the same error and returns it
    return number >= logging.INFO


def context_keys() -> dict[str, Any]:
    """What is bound for structlog here."""
    return structlog.contextvars.get_contextvars()


def bind_context(keys: Mapping[str, Any]) -> None:
    """Bind these keys for structlog, and no others."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**keys)


class _AppLogger:
    """The logger that structlog makes for us; kept, so that structlog can cache it, until structlog is reconfigured."""

    def __init__(self) -> None:
        self._config: dict[str, Any] = {}
        self._logger: Any = None

    def logger(self) -> Any:
        """The bound logger."""
        config = structlog.get_config()
        if config != self._config:
            self._logger, self._config = structlog.get_logger(_NAME), config
        return self._logger.bind()


_app = _AppLogger()


def _enabled_by_app(number: int) -> bool:
    logger = _app.logger()
    # Looked up on the class: a bound logger passes attributes that it has not on to what it wraps.
    if hasattr(type(logger), "is_enabled_for"):  # filtering bound loggers, since structlog 25.1
        return bool(logger.is_enabled_for(number))
    if structlog.stdlib.filter_by_level in structlog.get_config()["processors"]:
        return _stdlib.isEnabledFor(number)
    return True


def _iso(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _text(event: str, keys: Mapping[str, object], message: Callable[[], str] | None) -> str:
    """A line for people who read only messages: an event with its keys, without stacks, if it has none of its own."""
    if message is not None:
        return message()
    shown = [(key, str(value)) for key, value in keys.items() if key != "timestamp"]
    pairs = [f"{key}={value[:_LONGEST_VALUE]}" for key, value in shown if "\n" not in value]
    return " ".join([event, *pairs])


# --- stdlib logging


def _record(logger: logging.Logger, level: str, line: structlog.typing.EventDict) -> logging.LogRecord:
    """A line as a record whose attributes are the keys."""
    error: BaseException | None = line.pop("record_error")
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    number = _NUMBERS[cast(Level, level)]
    record = logger.makeRecord(logger.name, number, __file__, 0, line.pop("record_text"), (), exc_info, "log")
    # Error reporters use the exception itself; formatters print this text, which is redacted.
    record.exc_text = line.get("exception")
    for key, value in line.items():
        taken = hasattr(record, key) or key in ("message", "asctime")
        setattr(record, f"{key}_" if taken else key, value)
    return record


def _to_record(logger: logging.Logger, level: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Hand a line to stdlib logging; the last processor."""
    logger.handle(_record(logger, level, line))
    raise structlog.DropEvent


_records = structlog.wrap_logger(
    _stdlib,
    processors=[structlog.stdlib.filter_by_level, _to_record],
    wrapper_class=structlog.stdlib.BoundLogger,
    context_class=dict,
    cache_logger_on_first_use=True,
)


def _is_disabled() -> bool:
    """Whether the app's configuration has disabled the logger that lines go to."""
    factory = structlog.get_config()["logger_factory"] if structlog.is_configured() else None
    return factory is None or isinstance(factory, structlog.stdlib.LoggerFactory)


def _log_although_disabled(level: Level, event: str, line: dict[str, object]) -> None:
    """Hand a warning or an error to the app's handlers: `dictConfig` disables what it does not name by default."""
    global _has_explained
    if _NUMBERS[level] < logging.WARNING:
        return
    if not _has_explained:
        _has_explained = True
        line["record_text"] = f"{line['record_text']} [{_DISABLED}]"
        line["logging_error"] = _DISABLED
    if _stdlib.hasHandlers():
        _stdlib.callHandlers(_record(_stdlib, level, {"event": event, **line}))
    else:
        _write(level, event, {key: value for key, value in line.items() if not key.startswith("record_")})


def _keys_are_hidden() -> bool:
    """Whether no handler of the app prints the keys of a record."""
    probe = logging.LogRecord(_NAME, logging.ERROR, __file__, 0, "", (), None)
    probe.__dict__.update(dict.fromkeys(("task", "run_id", "error_type", "http_route"), _PROBE))
    logger: logging.Logger | None = _stdlib
    while logger is not None:
        if any(_PROBE in handler.format(probe) for handler in logger.handlers):
            return False
        logger = logger.parent if logger.propagate else None
    return True


def _report(level: Level, event: str, line: Mapping[str, object]) -> None:
    """
    Make a record that no handler prints, for error reporters that hook into `logging.Logger` itself, as Sentry's SDK
    does: where lines do not pass through stdlib logging, a contained failure would escape them. Where they do, the
    same exception is recognised as reported.
    """
    hooks = logging.getLogger(f"{_NAME}.failures")
    if hooks.propagate:
        hooks.addHandler(logging.NullHandler())
        hooks.propagate = False
    if hooks.isEnabledFor(_NUMBERS[level]):
        try:
            _to_record(hooks, level, {"event": event, **line})
        except structlog.DropEvent:
            pass


# --- stderr


def _ordered(logger: object, level: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """What a reader looks for first comes first."""
    return {**{key: line.pop(key) for key in ("event", "level", "timestamp")}, **line}


_TO_JSON: list[structlog.typing.Processor] = [
    structlog.processors.add_log_level,
    _ordered,
    structlog.processors.JSONRenderer(default=str),
]
_FROM_INFO = structlog.make_filtering_bound_logger(logging.INFO)


def _write(level: Level, event: str, keys: Mapping[str, object]) -> None:
    """One JSON line to stderr, at info and above; without a working stderr there is none."""
    if sys.stderr is None:
        return
    try:
        # sys.stderr is looked up each time: it may be replaced.
        logger = structlog.wrap_logger(structlog.WriteLogger(sys.stderr), _TO_JSON, _FROM_INFO, dict)
        getattr(logger, level)(event, **keys)
    except (OSError, ValueError):  # it is broken, or closed
        pass
