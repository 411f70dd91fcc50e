"""Logs: structlog to stderr, for people on a terminal, one JSON object per line otherwise.

Within somebody else's process they go to `logging`, to be routed as all others.

No password leaves through them: whatever looks like a URL with credentials is
masked in every value and every traceback, and tracebacks show no variables.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from typing import TYPE_CHECKING, Final

import orjson
import structlog
from structlog.processors import ExceptionRenderer
from structlog.tracebacks import ExceptionDictTransformer

from cqrs_es.telemetry.masking import masked_value, printable

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

    from cqrs_es.settings import LogFormat, LogLevel

# What a reader looks for first.
_FIRST: Final = ("timestamp", "level", "logger", "event")
_MULTILINE: Final = {"exception", "stack"}


def configure(level: LogLevel, log_format: LogFormat) -> None:
    """Send the logs of the framework, and of every library, to stderr.

    Libraries are heard from `warning` on, unless the level is `debug`. AWS's never is heard
    at `debug`: its lines have session tokens in them.
    """
    structlog.configure(
        processors=_processors(console=_for_people(log_format)),
        wrapper_class=structlog.make_filtering_bound_logger(_number(level)),
        logger_factory=_StderrLogger,
    )
    logging.captureWarnings(capture=True)
    loudness = _number(level) if level == "debug" else max(_number(level), logging.WARNING)
    logging.basicConfig(level=loudness, handlers=[_ToStructlog()], force=True)
    for name in ("botocore", "aiobotocore"):
        logging.getLogger(name).setLevel(max(loudness, logging.INFO))


def to_logging_unless_configured() -> None:
    """Where nobody has set structlog up, hand logs to `logging`, to loggers below `cqrs_es`."""
    if not structlog.is_configured():
        structlog.configure(
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.contextvars.merge_contextvars,
                structlog.processors.format_exc_info,
                _mask,
                _to_record,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
            logger_factory=structlog.stdlib.LoggerFactory(),
        )


def name_process(**ids: str) -> None:
    """Put ids of this process on every JSON line from now on, whichever thread writes it.

    A person at a terminal has them in the banner.
    """
    processors = structlog.get_config()["processors"]
    if processors[-1] is _to_json:
        structlog.configure(processors=[_adding(ids), *processors])


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
        structlog.processors.format_exc_info if console else _structured_exception(),
        _mask,
        *([_escape, _console()] if console else [_to_json]),
    ]


def _structured_exception() -> Processor:
    """Give tracebacks as objects: type, message, frames, and what caused it."""
    return ExceptionRenderer(ExceptionDictTransformer(show_locals=False))


def _console() -> Processor:
    return structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(),
        exception_formatter=structlog.dev.plain_traceback,
        sort_keys=False,
    )


def _to_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    first = {name: event.pop(name) for name in _FIRST if name in event}
    try:
        return orjson.dumps({**first, **event}).decode()
    except TypeError:  # half a surrogate pair, in the name of a file perhaps
        return json.dumps({**first, **event}, default=repr)


def _to_record(
    _logger: WrappedLogger, _method: str, event: EventDict
) -> tuple[tuple[str], dict[str, dict[str, EventDict]]]:
    """Make the arguments of a `logging` call: a line, its fields also as `record.cqrs_es`.

    The line is no format: it has no arguments. A traceback is masked text within
    it, since formatters would show the exception's own.
    """
    name, traceback = event.pop("event"), event.pop("exception", "")
    fields = "".join(f" {key}={value}" for key, value in event.items())
    line = printable(f"{name}{fields}") + (f"\n{_printable(traceback)}" if traceback else "")
    return (line,), {"extra": {"cqrs_es": event}}


def _adding(ids: dict[str, str]) -> Processor:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        for name, value in ids.items():
            event.setdefault(name, value)
        return event

    return add


def _add_logger_name(logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event["logger"] = logger.name
    return event


def _mask(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for name, value in event.items():
        event[name] = masked_value(value)
    return event


def _escape(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Keep a line one line, and the terminal as it is, whatever somebody sent."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = _printable(value) if name in _MULTILINE else printable(value)
    return event


def _printable(lines: str) -> str:
    return "\n".join(map(printable, lines.split("\n")))


class _StderrLogger:
    """Writes to whatever stderr is at the time: a live display may have put itself before it.

    Whole lines, one after the other, whichever threads they come from. One
    thread may write within its own writing: a warning from a finaliser.
    """

    _writing = threading.RLock()

    def __init__(self, name: str = "cqrs_es") -> None:
        self.name = name

    def msg(self, message: str) -> None:
        with self._writing:
            sys.stderr.write(message + "\n")
            sys.stderr.flush()

    debug = info = warning = error = critical = exception = log = msg


class _ToStructlog(logging.Handler):
    """Hands what libraries log to structlog, so that stderr has one format."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.get_logger(record.name)
        logger.log(_standard(record.levelno), _message(record), exc_info=record.exc_info)


def _message(record: logging.LogRecord) -> str:
    """Return what was logged, also where the arguments do not fit the format."""
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - a library's mistake must not end what it was called for
        return f"{record.msg} {record.args}"


def _standard(level: int) -> int:
    """Return the standard level at or below a level of somebody's own, at least `debug`."""
    return min(max(level // 10 * 10, logging.DEBUG), logging.CRITICAL)
