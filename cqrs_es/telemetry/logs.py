"""Logs: structlog to stderr, for people on a terminal, one JSON object per line otherwise.

No password leaves through them: whatever looks like a URL with credentials is
masked in every value and every traceback, and tracebacks show no variables.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING, Any, Final

import orjson
import structlog

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from structlog.typing import EventDict, Processor, WrappedLogger

    from cqrs_es.settings import LogFormat, LogLevel

# What a reader looks for first.
_FIRST: Final = ("timestamp", "level", "logger", "event")
_CREDENTIALS: Final = re.compile(r"(?<=://)([^\s/:@]*):\S*@")


def configure(level: LogLevel, log_format: LogFormat) -> None:
    """Send the logs of the framework, and of every library, to stderr.

    Libraries are heard from `warning` on, unless the level is `debug`.
    """
    structlog.configure(
        processors=_processors(console=_for_people(log_format)),
        wrapper_class=structlog.make_filtering_bound_logger(_number(level)),
        logger_factory=_StderrLogger,
    )
    logging.captureWarnings(capture=True)
    loudness = _number(level) if level == "debug" else max(_number(level), logging.WARNING)
    logging.basicConfig(level=loudness, handlers=[_ToStructlog()], force=True)


def quiet_unless_configured() -> None:
    """Where nobody has set logs up, send warnings to stderr: a library does not chat."""
    if not structlog.is_configured():
        structlog.configure(
            processors=_processors(console=_for_people("auto")),
            wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
            logger_factory=_StderrLogger,
        )


def mask_credentials(text: str) -> str:
    """Replace the passwords of the URLs in a text by stars."""
    return _CREDENTIALS.sub(r"\1:***@", text)


def _for_people(log_format: LogFormat) -> bool:
    return log_format == "console" or (log_format == "auto" and sys.stderr.isatty())


def _number(level: LogLevel) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


def _processors(*, console: bool) -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        _add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _mask,
        _console() if console else _to_json,
    ]


def _console() -> Processor:
    return structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )


def _to_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    first = {name: event.pop(name) for name in _FIRST if name in event}
    return orjson.dumps({**first, **event}, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()


def _add_logger_name(logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event["logger"] = logger.name
    return event


def _mask(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    _mask_values(event)
    return event


def _mask_values(values: MutableMapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, str):
            values[name] = mask_credentials(value)


class _StderrLogger:
    """Writes to whatever stderr is at the time: a live display may have put itself before it."""

    def __init__(self, name: str = "cqrs_es") -> None:
        self.name = name

    def msg(self, message: str) -> None:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()

    debug = info = warning = error = critical = exception = log = msg


class _ToStructlog(logging.Handler):
    """Hands what libraries log to structlog, so that stderr has one format."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.get_logger(record.name)
        logger.log(record.levelno, record.getMessage(), exc_info=record.exc_info)
